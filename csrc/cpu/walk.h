// How the CPU ops walk the weights: one parallel region over all tasks of the plan, and what a row
// kernel (rows.h) is given of each task.
#pragma once

#include <cmath>
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

// What an op does to the slices of the groups in `mask`.
struct Penalty {
  const bool* mask = nullptr;  // [groups]; null: no group is pruned
  double factor = 1;           // Eq. 9
  const double* slopes =
      nullptr;  // [slices] Eq. 8: λ / ‖slice‖, 0 where it is not pruned; null: no Eq. 8

  bool prunes(const Plan& plan, int32_t slice) const {
    return slice >= 0 && mask[plan.slice_group[slice]];
  }
};

// Penalty.slopes, from Bound::slice_sq. A slice of norm 0 has slope 0.
std::vector<double> compute_slopes(const Bound& bound, const bool* mask, double lam);

// Whether any group is pruned.
bool prunes_any(const Penalty& penalty, const Plan& plan);

// Slices that a thread takes at a time where each costs a square root: about ten microseconds of work,
// so that starting it does not count.
constexpr int64_t kSlicesPerTask = 8192;

// What a thread keeps from task to task. The columns' part stays valid while it is at the same tensor.
struct ThreadMemory {
  int32_t tensor = -1;
  bool any_col = false;         // a column of the tensor is pruned
  std::vector<Span> spans;      // Bands::spans
  Scratch pruned_cols, slopes;  // [width]
  Scratch band_slope, band_pruned, band_sums, col_sums;
};

// Fills Bands::pruned and Bands::slope for the rows of a task. Returns how many rows are pruned.
template <class T>
int32_t set_row_penalty(const Bound& bound, const Task& task, const Penalty& penalty,
                        ThreadMemory& memory, Bands<T>& b) {
  using A = accumulator_t<T>;
  const Matrix& m = bound.matrices[task.tensor];
  auto* pruned = memory.band_pruned.get<uint8_t>(b.count);
  auto* slope = penalty.slopes ? memory.band_slope.get<A>(b.count) : nullptr;
  int32_t rows = 0;
  for (int32_t row = task.first_row; row < task.last_row; ++row) {
    const int32_t slice = m.row_base < 0 ? -1 : bound.plan.row_slice[m.row_base + row];
    const bool goes = penalty.prunes(bound.plan, slice);
    rows += goes;
    const int64_t first = static_cast<int64_t>(row - task.first_row) * m.bands;
    std::fill_n(pruned + first, m.bands, goes);
    if (slope)
      std::fill_n(slope + first, m.bands, static_cast<A>(slice < 0 ? 0 : penalty.slopes[slice]));
  }
  b.pruned = pruned;
  b.slope = slope;
  return rows;
}

// Fills Bands::pruned_cols, slopes and spans for the columns of a tensor, once a thread.
template <class T>
void set_column_penalty(const Bound& bound, int32_t tensor, const Penalty& penalty, ThreadMemory& memory,
                        Bands<T>& b) {
  using A = accumulator_t<T>;
  const Matrix& m = bound.matrices[tensor];
  auto* pruned_cols = memory.pruned_cols.get<uint8_t>(b.width + 16);  // a vector reads beyond the last
  A* slopes = penalty.slopes ? memory.slopes.get<A>(b.width) : nullptr;
  if (memory.tensor != tensor) {
    memory.tensor = tensor;
    memory.any_col = false;
    memory.spans.clear();
    // Spans are whole vectors. Leaving out a gap of four vectors or fewer takes longer than touching it.
    constexpr int64_t kVector = 64 / sizeof(A), kSmallestGap = 4 * kVector;
    for (int64_t c = 0; m.col_base >= 0 && c < m.cols; ++c) {
      const int32_t slice = bound.plan.col_slice[m.col_base + c];
      const bool goes = penalty.prunes(bound.plan, slice);
      std::fill_n(pruned_cols + c * m.run, m.run, goes);
      if (slopes)
        std::fill_n(slopes + c * m.run, m.run, static_cast<A>(slice < 0 ? 0 : penalty.slopes[slice]));
      if (!goes) continue;
      memory.any_col = true;
      const int64_t first = c * m.run / kVector * kVector;
      if (memory.spans.empty() || first - memory.spans.back().last > kSmallestGap) {
        memory.spans.push_back({first, 0});
      }
      const int64_t last = ((c + 1) * m.run + kVector - 1) / kVector * kVector;
      memory.spans.back().last = std::min<int64_t>(last, b.width);
    }
  }
  b.pruned_cols = memory.any_col ? pruned_cols : nullptr;
  b.slopes = memory.any_col ? slopes : nullptr;
  b.spans = memory.spans.data();
  b.num_spans = static_cast<int64_t>(memory.spans.size());
}

// What a row kernel is given of a task. count = 0: the op touches nothing in it. Gradients, optimizer
// states and `other` are left null.
template <class T>
Bands<T> make_bands(const Bound& bound, const Task& task, const Penalty& penalty, ThreadMemory& memory) {
  const Matrix& m = bound.matrices[task.tensor];
  Bands<T> b{};
  b.w = static_cast<T*>(m.weight) + static_cast<int64_t>(task.first_row) * m.bands * m.width;
  b.width = band_width(m, task.first_row);
  b.count = static_cast<int64_t>(task.last_row - task.first_row) * m.bands;
  b.band_sums = memory.band_sums.get<double>(b.count);
  b.touches_all = true;
  if (!penalty.mask || !has_slices(m)) return b;

  b.factor = static_cast<accumulator_t<T>>(penalty.factor);
  const int32_t rows = set_row_penalty(bound, task, penalty, memory, b);
  set_column_penalty(bound, task.tensor, penalty, memory, b);
  if (rows == 0 && !memory.any_col) b.count = 0;
  // Where three quarters of a band are touched, touching all of it is faster.
  int64_t covered = 0;
  for (const Span& span : memory.spans) covered += span.last - span.first;
  b.touches_all = 4 * covered >= 3 * b.width || rows == task.last_row - task.first_row;
  return b;
}

// Calls task(task, memory) for every task of the plan, in parallel.
template <class F>
void for_each_task(const Bound& bound, const F& f) {
  for_each<ThreadMemory>(bound.tasks, [&](int64_t i, ThreadMemory& memory) {
    f(find_task(bound.matrices.data(), bound.plan.tensors, static_cast<int32_t>(i)), memory);
  });
}

}  // namespace ocsfast::cpu
