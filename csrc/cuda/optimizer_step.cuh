// An optimizer's step with Eq. 8 before and Eq. 9 after it, in one walk, for whichever optimizer.
//
// A Rule says how the optimizer moves a weight. It is part of the kernel's argument and has
//   kStates               the tensors it keeps like each weight
//   kTensors              the weights a launch takes: as many as the kernel's argument has room for
//   PerTensor<C>          what it knows of one tensor, held in registers; everything else is read from
//   the
//                         kernel's argument where it is used
//   per_tensor<C>(work, tensor, lr)
//   slope<C>()            what L2 weight decay adds to the gradient: slope * weight
//   move<T>(before, change, tensor, states, has_states)
//                         the weight after a step; `change` is the gradient with Eq. 8 in it. Changes
//                         the states' elements
//   load(arguments, first, tensors)
//                         on the host: sets what differs from launch to launch
#pragma once

#include "launch.cuh"
#include "score.cuh"

namespace ocsfast::cuda {

// The kernel's argument, besides Work.
template <class Rule>
struct StepSettings {
  PointerTable<Rule::kTensors> grads, states[Rule::kStates];
  Number<double> lr;
  Number<float> lam, factor;
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null: 0
  bool squares_known, maximize;
  Rule rule;
};

template <class Rule>
struct OptimizerStep {
  using Reduce = Sum;
  // One row at a time: its three or four operands already put as many loads in flight.
  static constexpr int kOperands = 2 + Rule::kStates, kUnroll = 1;
  static constexpr uint32_t kWrites = ((1u << kOperands) - 1) & ~2u;  // all but the gradient
  static constexpr bool kPenalized = true, kSparse = false, kSums = true;

  const StepSettings<Rule>& settings;

  template <class T>
  struct Body {
    using C = accumulator_t<T>;
    T* operand[kOperands];  // weight, gradient, states
    C factor;
    C multiplier;  // of gradients: -1 to maximize, divided by the loss's scale
    typename Rule::template PerTensor<C> tensor;
    const StepSettings<Rule>& settings;

    __device__ C change(T (&element)[kOperands], SlicePenalty<C> row, SlicePenalty<C> col) const {
      C now = to_number(element[0]);
      if (operand[1]) {
        const C slope = settings.rule.template slope<C>() + row.slope + col.slope;
        C change = to_number(element[1]) * multiplier;
        if (slope != C(0)) change += now * slope;
        now = settings.rule.template move<T>(now, change, tensor, element + 2, operand[2] != nullptr);
      }
      if (row.active || col.active) now *= row.active && col.active ? factor * factor : factor;
      element[0] = from_number<T>(now);
      const C stored = to_number(element[0]);
      return stored * stored;
    }
  };

  template <class A>
  __device__ SlicePenalty<A> penalty(const Work& work, int32_t slice) const {
    const bool pruned = is_pruned(work, slice);
    return {pruned, pruned ? compute_slope(work, slice, A(settings.lam.get())) : A(0)};
  }
  __device__ bool walks(const Work& work, int32_t tensor) const {
    return (work.mask && has_slices(work.matrices[tensor])) || settings.grads(work, tensor);
  }
  template <class T>
  __device__ Body<T> body(const Work& work, int32_t tensor) const {
    using C = accumulator_t<T>;
    Body<T> body{{get_weight<T>(work, tensor), static_cast<T*>(settings.grads(work, tensor))},
                 static_cast<C>(settings.factor.get()),
                 (settings.maximize ? C(-1) : C(1)) /
                     (settings.grad_scale ? static_cast<C>(*settings.grad_scale) : C(1)),
                 settings.rule.template per_tensor<C>(work, tensor, settings.lr.get()),
                 settings};
#pragma unroll
    for (int i = 0; i < Rule::kStates; ++i)
      body.operand[2 + i] = static_cast<T*>(settings.states[i](work, tensor));
    return body;
  }
};

template <class Rule, class A>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<A>)
    step_kernel(const __grid_constant__ Work work, const __grid_constant__ StepSettings<Rule> settings) {
  __shared__ Shared<A> shared;
  const auto grid = cooperative_groups::this_grid();
  if (work.mask && !settings.squares_known) compute_squares<A>(work, shared);
  if (settings.found_inf && *settings.found_inf != 0) return;  // every thread of the grid returns
  walk<A>(work, OptimizerStep<Rule>{settings}, shared);
  if (!work.mask) return;
  grid.sync();  // until here blocks may still read the squares of the weights before the step
  gather_slices<Sum, A>(
      work, false, [](int32_t) { return true; }, static_cast<A*>(work.slice_sq),
      static_cast<A*>(nullptr));
}

template <class Rule, class Arguments>
void take_step(const char* op, const Bound& bound, const StepArguments& step,
               const std::vector<void*>* const (&states)[Rule::kStates], const Arguments& arguments,
               const Rule& rule, cudaStream_t stream) {
  static_assert(sizeof(Work) + sizeof(StepSettings<Rule>) <= kArgumentBytes);
  Work work = make_work(bound, step.mask);
  StepSettings<Rule> settings{};
  settings.lr = step.lr;
  settings.lam = step.lam;
  settings.factor = step.factor;
  settings.squares_known = step.squares_known;
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
  record_use(op, bound, stream);
}

}  // namespace ocsfast::cuda
