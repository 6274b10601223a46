// How the CPU ops walk the weights of a plan: one parallel region over all tasks; what a task touches,
// as its row kernel wants it; and the sums it leaves behind, of rows, of columns and at last of slices.
#pragma once

#include <atomic>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "../bound.h"
#include "parallel.h"
#include "rows.h"

namespace ocsfast::cpu {

// Calls f(T{}) with the element type of a matrix.
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float{});
    case DType::kDouble:
      return f(double{});
    case DType::kHalf:
      return f(c10::Half{});
    case DType::kBFloat16:
      return f(c10::BFloat16{});
  }
}

// What happens to the slices of the groups in `mask`.
struct Penalty {
  const bool* mask = nullptr;  // [groups]; null: no group is pruned
  double factor = 1;           // Eq. 9
  // [slices] Eq. 8, where it counts: strength / |slice|, 0 where the slice stays
  const double* slopes = nullptr;

  bool prunes(const Plan& plan, int32_t slice) const {
    return slice >= 0 && mask[plan.slice_group[slice]];
  }
};

// Penalty.slopes: 0 also where a slice's norm is.
std::vector<double> take_slopes(const Bound& bound, const bool* mask, double strength);

// Whether any group is pruned.
bool prunes_any(const Penalty& penalty, const Plan& plan);

// Slices that a thread takes at a time where each costs a root: ten microseconds.
constexpr int64_t kSlicesPerTask = 8192;

// What a thread keeps from task to task: what it knows of the columns of the tensor it is at, and
// memory.
struct State {
  int32_t tensor = -1;
  bool any_col = false;
  std::vector<Span> spans;
  Scratch pruned_cols, slopes;  // [width]
  Scratch band_slope, band_pruned, band_sums, col_sums;
};

// What a task walks and touches, but for the tensors beside the weights. count = 0: nothing.
template <class T>
Bands<T> bands_of(const Bound& bound, const Task& task, const Penalty& penalty, State& state) {
  using A = accumulator_t<T>;
  const Plan& plan = bound.plan;
  const Matrix& m = bound.matrices[task.tensor];
  const int64_t offset = static_cast<int64_t>(task.first_row) * m.bands * m.width;
  Bands<T> b{};
  b.w = static_cast<T*>(m.weight) + offset;
  b.width = band_width(m, task.first_row);
  b.count = static_cast<int64_t>(task.last_row - task.first_row) * m.bands;
  b.band_sums = state.band_sums.get<double>(b.count);
  b.dense = true;
  if (!penalty.mask || !has_slices(m)) return b;

  auto* pruned = state.band_pruned.get<uint8_t>(b.count);
  auto* slope = penalty.slopes ? state.band_slope.get<A>(b.count) : nullptr;
  int32_t rows = 0;
  for (int32_t row = task.first_row; row < task.last_row; ++row) {
    const int32_t slice = m.row_base < 0 ? -1 : plan.row_slice[m.row_base + row];
    const bool goes = penalty.prunes(plan, slice);
    rows += goes;
    const int64_t first = static_cast<int64_t>(row - task.first_row) * m.bands;
    std::fill_n(pruned + first, m.bands, goes);
    if (slope)
      std::fill_n(slope + first, m.bands, static_cast<A>(slice < 0 ? 0 : penalty.slopes[slice]));
  }
  auto* pruned_cols = state.pruned_cols.get<uint8_t>(b.width + 16);  // a vector reads on
  A* slopes = penalty.slopes ? state.slopes.get<A>(b.width) : nullptr;
  if (state.tensor != task.tensor) {
    state.tensor = task.tensor;
    state.any_col = false;
    state.spans.clear();
    // Spans are whole vectors. Gaps of up to four of them are not worth leaving out.
    constexpr int64_t kVector = 64 / sizeof(A), kLeastGap = 4 * kVector;
    for (int64_t c = 0; m.col_base >= 0 && c < m.cols; ++c) {
      const int32_t slice = plan.col_slice[m.col_base + c];
      const bool goes = penalty.prunes(plan, slice);
      std::fill_n(pruned_cols + c * m.run, m.run, goes);
      if (slopes)
        std::fill_n(slopes + c * m.run, m.run, static_cast<A>(slice < 0 ? 0 : penalty.slopes[slice]));
      if (!goes) continue;
      state.any_col = true;
      const int64_t first = c * m.run / kVector * kVector;
      if (state.spans.empty() || first - state.spans.back().last > kLeastGap) {
        state.spans.push_back({first, 0});
      }
      const int64_t last = ((c + 1) * m.run + kVector - 1) / kVector * kVector;
      state.spans.back().last = std::min<int64_t>(last, b.width);
    }
  }
  if (rows == 0 && !state.any_col) b.count = 0;
  // Where most of a band is touched, all of it is taken: that is sooner done.
  int64_t covered = 0;
  for (const Span& span : state.spans) covered += span.last - span.first;
  b.dense = 4 * covered >= 3 * b.width || rows == task.last_row - task.first_row;
  b.pruned = pruned;
  b.slope = slope;
  b.factor = static_cast<A>(penalty.factor);
  b.pruned_cols = state.any_col ? pruned_cols : nullptr;
  b.slopes = state.any_col ? slopes : nullptr;
  b.spans = state.spans.data();
  b.num_spans = static_cast<int64_t>(state.spans.size());
  return b;
}

// Sums over rows and columns, and over slices when a tensor's last task is done: by whoever finishes it,
// in a fixed order, so that the result does not depend on the threads. What is summed is the kernel's
// affair; they are added up, or the largest is taken.
class Sums {
 public:
  // slices: [plan.slices] out, 0 for tensors that are not run. With `touched_only`, those of slices that
  // are not pruned mean nothing, and of tensors that are not run they stay as they were.
  Sums(const Bound& bound, double* slices, bool touched_only, bool largest = false);

  // Runs kernel(bands) for a task, whose bands may have count 0, and keeps what it sums.
  template <class T, class Kernel>
  void run(const Task& task, const Bands<T>& bands, State& state, const Kernel& kernel) {
    if (bands.count > 0) run_bands(task, bands, state, kernel);
    finish(task.tensor);
  }

 private:
  // Bands whose column sums are taken before they go on in double: 128 additions lose less than rounding
  // the result to float does.
  static constexpr int64_t kBandsPerFold = 128;

  template <class T, class Kernel>
  void run_bands(const Task& task, const Bands<T>& all, State& state, const Kernel& kernel);
  double join(double a, double b) const { return largest_ ? (a > b || a != a ? a : b) : a + b; }
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
  std::unique_ptr<std::atomic<int32_t>[]> left_;    // tasks of a tensor that are not done
  std::unique_ptr<std::atomic<bool>[]> with_cols_;  // whether its columns are summed
};

template <class T, class Kernel>
void Sums::run_bands(const Task& task, const Bands<T>& all, State& state, const Kernel& kernel) {
  using A = accumulator_t<T>;
  const Matrix& m = bound_.matrices[task.tensor];
  const bool with_cols = m.col_base >= 0 && (!touched_only_ || all.pruned_cols);
  Bands<T> b = all;
  if (with_cols) {
    with_cols_[task.tensor].store(true, std::memory_order_relaxed);
    b.col_sums = state.col_sums.get<A>(m.width);
  }
  for (int64_t first = 0; first < all.count; first += kBandsPerFold) {
    const int64_t offset = first * all.width;
    b.count = std::min(kBandsPerFold, all.count - first);
    b.w = all.w + offset;
    if (all.grad) b.grad = all.grad + offset;
    for (int i = 0; i < kMostStates; ++i) {
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
    for (int32_t k = 0; k < m.bands; ++k) sum = join(sum, bands[k]);
    row_sums_[m.row_base + row] = sum;
  }
}

// slices: [plan.slices] out, what the criterion takes from each. `others` are tensors beside the
// weights, where it needs them; slices of a weight without one stay 0.
void sum_up(const Bound& bound, const Criterion& criterion, const std::vector<void*>& others,
            double* slices);

// The slices' sums of squares, for all ops to use.
double* sum_squares(const Bound& bound);

// Calls task(task, state) for every task of the plan.
template <class F>
void for_each_task(const Bound& bound, const F& f) {
  for_each<State>(bound.tasks, [&](int64_t i, State& state) {
    f(find_task(bound.matrices.data(), bound.plan.tensors, static_cast<int32_t>(i)), state);
  });
}

}  // namespace ocsfast::cpu
