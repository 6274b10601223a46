// Gathering the sums that a walk leaves: of bands to rows, of rows and of columns to slices.
#pragma once

#include <atomic>
#include <memory>
#include <type_traits>
#include <vector>

#include "walk.h"

namespace ocsfast::cpu {

// The sums of one walk. Whichever thread ends the last task of a tensor gathers that tensor's slices, in
// a fixed order, so the result does not depend on the threads. What the row kernel sums is its own
// affair; here sums are added up, or the largest is taken.
class Sums {
 public:
  // slices: [plan.slices] out; 0 for the slices of a tensor that is not run. With `touched_only` only
  // pruned slices get a value: others get none that means anything, and those of a tensor that is not
  // run keep theirs.
  Sums(const Bound& bound, double* slices, bool touched_only, bool largest = false);

  // Calls kernel(bands) for a task and keeps what it sums. Bands of count 0 are not passed on.
  template <class T, class Kernel>
  void run(const Task& task, const Bands<T>& bands, ThreadMemory& memory, const Kernel& kernel) {
    if (bands.count > 0) run_bands(task, bands, memory, kernel);
    finish(task.tensor);
  }

 private:
  // Bands whose columns are summed in float before the sums go on in double. 128 additions in float lose
  // less than rounding the result to float does.
  static constexpr int64_t kBandsPerFold = 128;

  template <class T, class Kernel>
  void run_bands(const Task& task, const Bands<T>& all, ThreadMemory& memory, const Kernel& kernel);
  double combine(double a, double b) const { return largest_ ? (a > b || a != a ? a : b) : a + b; }
  double* partial(const Task& task) const {
    const Matrix& m = bound_.matrices[task.tensor];
    return partials_ + m.first_partial + static_cast<int64_t>(task.number) * m.cols;
  }
  void finish(int32_t tensor);
  void sum_slices(int32_t tensor) const;

  const Bound& bound_;
  bool touched_only_, largest_;
  double* row_sums_;
  double* partials_;
  double* slices_;
  std::unique_ptr<std::atomic<int32_t>[]> left_;    // [tensors] tasks that have not ended
  std::unique_ptr<std::atomic<bool>[]> with_cols_;  // [tensors] whether its columns are summed
};

template <class T, class Kernel>
void Sums::run_bands(const Task& task, const Bands<T>& all, ThreadMemory& memory, const Kernel& kernel) {
  using A = accumulator_t<T>;
  const Matrix& m = bound_.matrices[task.tensor];
  const bool with_cols = m.col_base >= 0 && (!touched_only_ || all.pruned_cols);
  Bands<T> b = all;
  if (with_cols) {
    with_cols_[task.tensor].store(true, std::memory_order_relaxed);
    b.col_sums = memory.col_sums.get<A>(m.width);
  }
  for (int64_t first = 0; first < all.count; first += kBandsPerFold) {
    const int64_t offset = first * all.width;
    b.count = std::min(kBandsPerFold, all.count - first);
    b.w = all.w + offset;
    if (all.grad) b.grad = all.grad + offset;
    for (int i = 0; i < kMaxStates; ++i) {
      if (all.state[i]) b.state[i] = all.state[i] + offset;
    }
    if (all.other) b.other = all.other + offset;
    if (all.pruned) b.pruned = all.pruned + first;
    if (all.slope) b.slope = all.slope + first;
    b.band_sums = all.band_sums + first;
    if (with_cols) std::fill_n(b.col_sums, m.width, A(0));
    kernel(b);
    if (with_cols) row_kernels<T>().fold(b.col_sums, m.cols, m.run, partial(task), largest_, first == 0);
  }
  if (m.row_base < 0) return;
  for (int32_t row = task.first_row; row < task.last_row; ++row) {
    const double* bands = all.band_sums + static_cast<int64_t>(row - task.first_row) * m.bands;
    double sum = 0;
    for (int32_t k = 0; k < m.bands; ++k) sum = combine(sum, bands[k]);
    row_sums_[m.row_base + row] = sum;
  }
}

// Sums over each slice what the criterion takes from an element. slices: [plan.slices] out. others: a
// pointer for each weight, if the criterion needs them; the slices of a weight whose pointer is null are
// 0.
void sum_elements(const Bound& bound, const Criterion& criterion, const std::vector<void*>& others,
                  double* slices);

// Writes all slices' sums of squares to Bound::slice_sq. Returns its memory.
double* compute_squares(const Bound& bound);

}  // namespace ocsfast::cpu
