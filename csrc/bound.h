// A plan bound to the weights it is for. Binding checks both once, so that an op costs microseconds
// however many tensors there are. Host only.
//
// An op finds its Bound by a ticket: a CPU tensor of one int64, the number under which bound.cpp keeps
// it. A number instead of a pointer, so that no ticket, not even a made-up one, leads to freed memory.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "checks.h"

namespace ocsfast {

// Kernels that were started and may not have run yet when the memory they use is about to be freed.
class PendingKernels {
 public:
  virtual ~PendingKernels() = default;
  // Whether the memory may be freed now: whoever gets it next will use it after those kernels.
  virtual bool allow_free() = 0;
};

struct Bound {
  Plan plan;  // points into `tables`
  std::vector<Matrix> matrices;
  int32_t tasks = 0;
  bool any_double = false;  // any weight is float64
  Tensor tables;
  std::vector<Tensor> weights;
  std::vector<Form> forms;  // of the weights
  // Scratch memory, used again at every call. Sums are double on the CPU; on CUDA they are float, or
  // double if any weight is.
  Tensor row_sums;          // [plan.num_rows]
  Tensor partials;          // each task's column sums, from Matrix::first_partial on
  Tensor slice_sq;          // [plan.slices] sums of squares, as the last op that computed them left them
  Tensor device_matrices;   // CUDA only: `matrices`, as bytes
  Tensor device_tasks;      // CUDA only: every Task of all matrices, as bytes
  Tensor bias_corrections;  // CUDA only: AdamW's, [tensors, 2] in double
  std::mutex mutex;         // held for the length of an op: ops share the scratch memory
  std::unique_ptr<PendingKernels> pending;  // CUDA only

  ~Bound();
  int64_t count_partials() const;  // elements of `partials`
};

// Checks all that the kernels rely on. It has no ticket yet.
std::shared_ptr<Bound> make_bound(const std::vector<Tensor>& weights, const Tensor& tables,
                                  const Tensor& shapes, const std::vector<int64_t>& layout,
                                  Backend backend);

// Keeps the Bound until `release` is called with the ticket's number. `shapes` may be any CPU tensor:
// the ticket is allocated like it.
Tensor issue_ticket(std::shared_ptr<Bound> bound, const Tensor& shapes);
void release(int64_t number);

// The Bound of a ticket, locked: no other op can use it before this one is done. Its weights are where
// they were when it was bound.
class LockedBound {
 public:
  LockedBound(const char* op, const Tensor& ticket);
  const Bound& operator*() const { return *bound_; }
  const Bound* operator->() const { return bound_.get(); }

 private:
  std::shared_ptr<Bound> bound_;
  std::unique_lock<std::mutex> lock_;
};

}  // namespace ocsfast
