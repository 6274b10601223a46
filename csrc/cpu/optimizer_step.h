// An optimizer's step with Eq. 8 before and Eq. 9 after it, in one walk, for whichever optimizer.
#pragma once

#include <optional>

#include "sums.h"

namespace ocsfast::cpu {

// What gradients are multiplied by: -1 to maximize, divided by the loss's scale.
template <class A>
A gradient_multiplier(const StepArguments& step) {
  return (step.maximize ? A(-1) : A(1)) / (step.grad_scale ? static_cast<A>(*step.grad_scale) : A(1));
}

inline bool is_skipped(const StepArguments& step) {
  return step.found_inf && *step.found_inf != 0;
}

// Calls move(bands, tensor), the optimizer's row kernel, for every task of a weight with a gradient;
// bands.grad and bands.state are set. A weight without a gradient takes no step, but is shrunk. With a
// penalty, all slices' sums of squares are left in Bound::slice_sq.
template <size_t kStates, class Move>
void take_step(const Bound& bound, const StepArguments& step,
               const std::vector<void*>* const (&states)[kStates], const Move& move) {
  static_assert(kStates <= kMaxStates);
  if (is_skipped(step)) {
    if (step.mask && !step.squares_known) compute_squares(bound);
    return;
  }
  Penalty penalty;
  std::vector<double> slopes;
  if (step.mask) {
    penalty.mask = step.mask;
    penalty.factor = step.factor.get();
    if (!step.squares_known && prunes_any(penalty, bound.plan)) compute_squares(bound);
    slopes = compute_slopes(bound, step.mask, step.lam.get());
    penalty.slopes = slopes.data();
  }
  std::optional<Sums> sums;
  if (step.mask) sums.emplace(bound, bound.slice_sq.mutable_data_ptr<double>(), false);
  for_each_task(bound, [&](const Task& task, ThreadMemory& memory) {
    const int32_t t = task.tensor;
    const Matrix& m = bound.matrices[t];
    const bool penalized = step.mask && has_slices(m);
    if (!penalized && !step.grads[t]) return;
    dispatch(m.dtype, [&](auto type) {
      using T = decltype(type);
      Bands<T> bands = make_bands<T>(bound, task, penalty, memory);
      const int64_t offset = bands.w - static_cast<T*>(m.weight);
      bands.touches_all = true;
      bands.count = static_cast<int64_t>(task.last_row - task.first_row) * m.bands;
      if (step.grads[t]) {
        bands.grad = static_cast<T*>(step.grads[t]) + offset;
        for (size_t i = 0; i < kStates; ++i) {
          void* const state = (*states[i])[t];
          if (state) bands.state[i] = static_cast<T*>(state) + offset;
        }
      }
      const auto kernel = [&](const Bands<T>& b) { b.grad ? move(b, t) : row_kernels<T>().shrink(b); };
      penalized ? sums->run(task, bands, memory, kernel) : kernel(bands);
    });
  });
}

}  // namespace ocsfast::cpu
