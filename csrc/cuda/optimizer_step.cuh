// An optimizer's step with Eq. 8 before and Eq. 9 after it, in one walk, for whichever optimizer.
//
// A Rule says how the optimizer moves a weight. It is part of the kernel's argument and has
//   kStates               the tensors it keeps like each weight
//   kTensors              the weights a launch takes: as many as the kernel's argument has room for
//   PerTensor<C>          what it knows of one tensor, held in registers; everything else is read from
//                         the kernel's argument where it is used
//   per_tensor<C>(work, tensor, lr)
//   slope<C>()            what L2 weight decay adds to the gradient: slope * weight
//   move<T>(weights, changes, tensor, states, has_states)
//                         takes a step with some weights; `changes` is the gradient with Eq. 8 in it.
//                         Changes the states' elements
//   load(arguments, first, tensors)
//                         on the host: sets what differs from launch to launch
#pragma once

#include "launch.cuh"
#include "walk.cuh"

namespace ocsfast::cuda {

// The kernel's argument, besides Work.
template <class Rule>
struct StepSettings {
  PointerTable<Rule::kTensors> grads, states[Rule::kStates];
  Number<double> lr;
  Number<float> lam, factor;
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null: 0
  bool maximize;
  Rule rule;
};

template <class Rule, bool kPenalized_>
struct OptimizerStep {
  using Reduce = Sum;
  static constexpr int kOperands = 2 + Rule::kStates, kRows = 1;
  static constexpr uint32_t kWrites = ((1u << kOperands) - 1) & ~2u;  // all but the gradient
  static constexpr bool kPenalized = kPenalized_, kSparse = false, kSums = kPenalized_;
  static constexpr int kBlocksInFloat = 3, kBlocksInHalf = kPenalized_ ? 2 : 3;
  static constexpr bool kUnrollBand = false;

  const StepSettings<Rule>& settings;

  template <class T>
  struct Body {
    using C = accumulator_t<T>;
    T* operand[kOperands];  // weight, gradient, states
    C factor;
    C multiplier;  // of gradients: -1 to maximize, divided by the loss's scale
    typename Rule::template PerTensor<C> tensor;
    const StepSettings<Rule>& settings;

    template <int kCount>
    __device__ void change(Pack<T, kCount> (&packs)[kOperands], SlicePenalty<C> row,
                           const ColumnPenalties<C, kCount>& cols, C (&terms)[kCount]) const {
      C weights[kCount];
      unpack(packs[0], weights);
      if (operand[1]) {
        C changes[kCount];
        unpack(packs[1], changes);
        const C slope = settings.rule.template slope<C>() + row.slope;
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          C own_slope = slope;
          if constexpr (kPenalized) own_slope += cols.slope[k];
          changes[k] = add_slope(changes[k] * multiplier, weights[k], own_slope);
        }
        settings.rule.template move<T>(weights, changes, tensor, packs + 2, operand[2] != nullptr);
      }
      if constexpr (kPenalized) scale_pruned(weights, factor, row.active, cols.active);
      round_into(packs[0], weights);
#pragma unroll
      for (int k = 0; k < kCount; ++k) terms[k] = weights[k] * weights[k];
    }
  };

  template <class A>
  __device__ SlicePenalty<A> penalty(const Work& work, int32_t slice) const {
    const bool pruned = work.mask && is_pruned(work, slice);
    return {pruned ? compute_slope(work, slice, A(settings.lam.get())) : A(0), pruned};
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

template <class Rule, class T, class A, bool kPenalized>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<OptimizerStep<Rule, kPenalized>, T, A>)
    step_kernel(const __grid_constant__ Work work, const __grid_constant__ StepSettings<Rule> settings) {
  using Op = OptimizerStep<Rule, kPenalized>;
  __shared__ Shared<Op, T, A> shared;
  if (settings.found_inf && *settings.found_inf != 0) return;  // every thread of the grid returns
  walk(work, Op{settings}, shared);
  if constexpr (kPenalized) {
    if (!work.mask || !work.gathers) return;
    // Until here blocks may still read the squares of the weights before the step.
    cooperative_groups::this_grid().sync();
    gather_slices<Sum, A>(
        work, false, [](int32_t) { return true; }, static_cast<A*>(work.slice_sq),
        static_cast<A*>(nullptr));
  }
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
  settings.grad_scale = step.grad_scale;
  settings.found_inf = step.found_inf;
  settings.maximize = step.maximize;
  settings.rule = rule;
  if (step.mask && !step.squares_known) launch_squares(op, bound, stream);
  for_each_launch(work, bound, Rule::kTensors, [&](auto types) {
    using Type = decltype(types);
    using T = typename Type::T;
    using A = typename Type::A;
    copy_pointers(work, step.grads, settings.grads);
    for (int i = 0; i < Rule::kStates; ++i) copy_pointers(work, *states[i], settings.states[i]);
    settings.rule.load(arguments, work.first_tensor, work.tensors);
    if constexpr (std::is_same_v<A, float>) {
      if (!step.mask)
        return launch_cooperative(op, step_kernel<Rule, T, A, false>, work, stream, work, settings);
    }
    launch_cooperative(op, step_kernel<Rule, T, A, true>, work, stream, work, settings);
  });
  record_use(op, bound, stream);
}

}  // namespace ocsfast::cuda
