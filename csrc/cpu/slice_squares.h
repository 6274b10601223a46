// Sums of squares of rows and columns in one read of the weights, then of slices.
//
// A task (rows of one tensor) writes its rows' sums and one partial sum a column; whoever finishes a
// tensor last adds them up, in a fixed order. The result does not depend on the number of threads.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "matrices.h"
#include "parallel.h"

namespace ocsfast::cpu {

class SliceSquares {
 public:
  // With `pruned`, only slices of pruned groups come out right, and what they do not need is not read.
  SliceSquares(const Plan& plan, const std::vector<Matrix>& matrices, const Pruned* pruned);

  void run(const Task& task, Scratch& scratch);

  // Returns when all tasks of a tensor are done. Other threads must have begun all that are not.
  void wait_for(int32_t tensor) const;

  // [plan.slices]; those of a tensor are there when all its tasks are done.
  const std::vector<double>& result() const { return slice_sq_; }

 private:
  bool needs_cols(int32_t tensor) const;
  template <class T>
  void square_task(const Task& task, Scratch& scratch);
  void sum_slices(int32_t tensor, Scratch& scratch);

  const Plan& plan_;
  const std::vector<Matrix>& matrices_;
  const Pruned* pruned_;
  std::unique_ptr<double[]> row_sq_;
  std::unique_ptr<double[]> partial_;
  std::unique_ptr<std::atomic<int32_t>[]> left_;  // tasks of a tensor that are not done; kSummed at last
  std::vector<double> slice_sq_;
};

}  // namespace ocsfast::cpu
