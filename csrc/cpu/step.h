// How the CPU takes an optimizer's step: one pass over what it changes, with the penalty in it.
#pragma once

#include <optional>

#include "walk.h"

namespace ocsfast::cpu {

// What gradients are multiplied by: -1 to climb, divided by the loss's scale.
template <class A>
A gradient_sign(const StepArguments& step) {
  return (step.maximize ? A(-1) : A(1)) / (step.grad_scale ? static_cast<A>(*step.grad_scale) : A(1));
}

inline bool is_skipped(const StepArguments& step) {
  return step.found_inf && *step.found_inf != 0;
}

// Calls by(bands, tensor) with all that is there to be stepped, for a weight with a gradient, first
// having pointed bands.state at `states`; a weight without one is shrunk. Leaves all slices' sums of
// squares behind where there is a penalty.
template <size_t kStates, class By>
void take_step(const Bound& bound, const StepArguments& step,
               const std::vector<void*>* const (&states)[kStates], const By& by) {
  static_assert(kStates <= kMostStates);
  if (is_skipped(step)) {
    if (step.mask && !step.squares_known) sum_squares(bound);
    return;
  }
  Penalty penalty;
  std::vector<double> slopes;
  if (step.mask) {
    penalty.mask = step.mask;
    penalty.factor = *step.factor;
    if (!step.squares_known && prunes_any(penalty, bound.plan)) sum_squares(bound);
    slopes = take_slopes(bound, step.mask, *step.lam);
    penalty.slopes = slopes.data();
  }
  std::optional<Sums> sums;
  if (step.mask) sums.emplace(bound, bound.slice_sq.mutable_data_ptr<double>(), false);
  for_each_task(bound, [&](const Task& task, State& state) {
    const int32_t t = task.tensor;
    const Matrix& m = bound.matrices[t];
    const bool penalized = step.mask && has_slices(m);
    if (!penalized && !step.grads[t]) return;
    dispatch(m.dtype, [&](auto type) {
      using T = decltype(type);
      Bands<T> bands = bands_of<T>(bound, task, penalty, state);
      const int64_t offset = bands.w - static_cast<T*>(m.weight);
      bands.dense = true;
      bands.count = static_cast<int64_t>(task.last_row - task.first_row) * m.bands;
      if (step.grads[t]) {
        bands.grad = static_cast<T*>(step.grads[t]) + offset;
        for (size_t i = 0; i < kStates; ++i) {
          void* const beside = (*states[i])[t];
          if (beside) bands.state[i] = static_cast<T*>(beside) + offset;
        }
      }
      const auto kernel = [&](const Bands<T>& b) { b.grad ? by(b, t) : row_kernels<T>().shrink(b); };
      penalized ? sums->run(task, bands, state, kernel) : kernel(bands);
    });
  });
}

}  // namespace ocsfast::cpu
