// An optimizer's step with Eq. 8 before and Eq. 9 after it, in one pass, whatever the optimizer's rule.
#pragma once

#include "launch.cuh"
#include "score.cuh"

namespace ocsfast::cuda {

// A kernel's argument. A Rule has
//   kStates: tensors it keeps beside each weight; kTensors: how many of the weights a launch takes
//   slope<C>(): what it adds to the gradients of the weights
//   of<C>(work, tensor, lr): what it knows of a tensor, in registers; all else is read where it is used,
//     from the kernel's argument
//   move<T>(before, change, of, states, has_states): the weight after a step by `change`, the gradient
//     with Eq. 8 in it; changes the states' elements
//   load(arguments, first, tensors): on the host, what it knows of a launch's tensors
template <class Rule>
struct Settings {
  Beside<Rule::kTensors> grads, states[Rule::kStates];
  const double* lr;
  const float* strength;
  const float* factor;
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null: 0
  bool known, maximize;
  Rule rule;
};

template <class Rule>
struct Stepper {
  using Join = Add;
  static constexpr int kStreams = 2 + Rule::kStates, kUnroll = 1;
  static constexpr uint32_t kWrites = ((1u << kStreams) - 1) & ~2u;  // all but the gradient
  static constexpr bool kPenalized = true, kSparse = false, kSums = true;

  const Settings<Rule>& settings;

  template <class T>
  struct Change {
    using C = accumulator_t<T>;
    T* stream[kStreams];  // weight, gradient, states
    C once;
    C sign;  // what gradients are multiplied by: -1 to climb, divided by the loss's scale
    typename Rule::template Of<C> of;
    const Settings<Rule>& settings;

    __device__ C change(T (&element)[kStreams], Label<C> row, Label<C> col) const {
      C now = to_number(element[0]);
      if (stream[1]) {
        const C slope = settings.rule.template slope<C>() + row.slope + col.slope;
        C change = to_number(element[1]) * sign;
        if (slope != C(0)) change += now * slope;
        now = settings.rule.template move<T>(now, change, of, element + 2, stream[2] != nullptr);
      }
      if (row.counts || col.counts) now *= row.counts && col.counts ? once * once : once;
      element[0] = from_number<T>(now);
      const C stored = to_number(element[0]);
      return stored * stored;
    }
  };

  template <class A>
  __device__ Label<A> label(const Work& work, int32_t slice) const {
    const bool pruned = is_pruned(work, slice);
    return {pruned, pruned ? slope_of(work, slice, A(*settings.strength)) : A(0)};
  }
  __device__ bool walks(const Work& work, int32_t tensor) const {
    return (work.mask && has_slices(work.matrices[tensor])) || settings.grads(work, tensor);
  }
  template <class T>
  __device__ Change<T> start(const Work& work, int32_t tensor) const {
    using C = accumulator_t<T>;
    Change<T> change{{weight_of<T>(work, tensor), static_cast<T*>(settings.grads(work, tensor))},
                     static_cast<C>(*settings.factor),
                     (settings.maximize ? C(-1) : C(1)) /
                         (settings.grad_scale ? static_cast<C>(*settings.grad_scale) : C(1)),
                     settings.rule.template of<C>(work, tensor, *settings.lr),
                     settings};
#pragma unroll
    for (int i = 0; i < Rule::kStates; ++i)
      change.stream[2 + i] = static_cast<T*>(settings.states[i](work, tensor));
    return change;
  }
};

template <class Rule, class A>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<A>)
    step_kernel(const __grid_constant__ Work work, const __grid_constant__ Settings<Rule> settings) {
  __shared__ Shared<A> shared;
  const auto grid = cooperative_groups::this_grid();
  if (work.mask && !settings.known) take_squares<A>(work, shared);
  if (settings.found_inf && *settings.found_inf != 0) return;  // every thread's answer
  walk<A>(work, Stepper<Rule>{settings}, shared);
  if (!work.mask) return;
  grid.sync();  // the squares of the step before have been read
  gather_slices<Add, A>(
      work, false, [](int32_t) { return true; }, static_cast<A*>(work.slice_sq),
      static_cast<A*>(nullptr));
}

template <class Rule, class Arguments>
void take_step(const char* op, const Bound& bound, const StepArguments& step,
               const std::vector<void*>* const (&states)[Rule::kStates], const Arguments& arguments,
               const Rule& rule, cudaStream_t stream) {
  static_assert(sizeof(Work) + sizeof(Settings<Rule>) <= kArgumentBytes);
  Work work = make_work(bound, step.mask);
  Settings<Rule> settings{};
  settings.lr = step.lr;
  settings.strength = step.lam;
  settings.factor = step.factor;
  settings.known = step.squares_known;
  settings.grad_scale = step.grad_scale;
  settings.found_inf = step.found_inf;
  settings.maximize = step.maximize;
  settings.rule = rule;
  for_each_window(work, bound, Rule::kTensors, [&] {
    copy_pointers(work, step.grads, settings.grads);
    for (int i = 0; i < Rule::kStates; ++i) copy_pointers(work, *states[i], settings.states[i]);
    settings.rule.load(arguments, work.first_tensor, work.tensors);
    launch_cooperative(op, bound.any_double ? step_kernel<Rule, double> : step_kernel<Rule, float>, work,
                       stream, work, settings);
  });
  used_on(op, bound, stream);
}

}  // namespace ocsfast::cuda
