#include "../adamw.h"
#include "optimizer_step.cuh"
#include "ptx.cuh"

namespace ocsfast::cuda {
namespace {

template <class C>
struct Scalars {
  C beta1, gain1, beta2, gain2, eps;  // gain: 1 - beta
};

// In float a quotient and a root may be off by one or two units in the last place: they make up a change
// that is small beside the weight. Exact ones take registers and branches; in half precision they would
// take more instructions than the memory leaves time for.
__device__ inline float divide(float a, float b) {
  return __fdividef(a, b);
}
__device__ inline double divide(double a, double b) {
  return a / b;
}
__device__ inline float root(float v) {
  return approximate_sqrt(v);
}
__device__ inline double root(double v) {
  return sqrt(v);
}

struct Adamw {
  // Three pointers for each tensor: 3 × 1344 × 8 = 32 256 bytes.
  static constexpr int kStates = 2, kTensors = std::min(1344, kMaxTensors);

  Scalars<float> in_float;
  Scalars<double> in_double;
  double weight_decay;
  const BiasCorrection* corrections;  // [tensors] on the device

  template <class C>
  struct PerTensor {
    C decay, rate, scale;  // decay: 1 - lr * weight_decay, what the weight is multiplied by
  };
  template <class C>
  __device__ const Scalars<C>& scalars() const {
    if constexpr (std::is_same_v<C, double>) {
      return in_double;
    } else {
      return in_float;
    }
  }
  template <class C>
  __device__ C slope() const {
    return C(0);
  }
  template <class C>
  __device__ PerTensor<C> per_tensor(const Work&, int32_t tensor, double lr) const {
    const BiasCorrection correction = corrections[tensor];
    return {static_cast<C>(1 - lr * weight_decay), static_cast<C>(lr * correction.average),
            static_cast<C>(correction.root_square)};
  }
  // Uses the averages as they are before they are rounded to T: a mean square too small for float16 is
  // stored as 0, and the weight would be divided by eps alone.
  template <class T, class C, int kCount>
  __device__ void move(C (&weights)[kCount], C (&changes)[kCount], const PerTensor<C>& tensor,
                       Pack<T, kCount>* states, bool) const {
    const Scalars<C>& s = scalars<C>();
    C averages[kCount], squares[kCount];
    unpack(states[0], averages);
    unpack(states[1], squares);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      averages[k] = averages[k] * s.beta1 + changes[k] * s.gain1;
      squares[k] = squares[k] * s.beta2 + changes[k] * changes[k] * s.gain2;
      weights[k] = weights[k] * tensor.decay -
                   divide(averages[k] * tensor.rate, root(squares[k]) * tensor.scale + s.eps);
    }
    round_into(states[0], averages);
    round_into(states[1], squares);
  }

  void load(const AdamwArguments&, int32_t, int32_t) {}
};

// Pointers to the weights' counts of steps, as many as a kernel's argument holds.
constexpr int kMaxCounters = std::min(4000, 2 * kMaxTensors);
struct Counters {
  float* steps[kMaxCounters];  // null: the weight takes no step
  int32_t first, count;
};

// Raises each weight's count of steps and computes its bias correction. A launch of its own, one thread
// a weight: in the step's kernel every thread would compute the two powers again.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ Counters counters, double beta1, double beta2,
                 const float* found_inf, BiasCorrection* corrections) {
  const int32_t t = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x);
  if (t >= counters.count || !counters.steps[t] || (found_inf && *found_inf != 0)) return;
  const float steps = *counters.steps[t] + 1;
  *counters.steps[t] = steps;
  corrections[counters.first + t] = bias_correction(beta1, beta2, steps);
}

void count_step(const char* op, const std::vector<float*>& steps, const float* found_inf, double beta1,
                double beta2, BiasCorrection* corrections, cudaStream_t stream) {
  Counters counters{};
  for (size_t first = 0; first < steps.size(); first += kMaxCounters) {
    counters.first = static_cast<int32_t>(first);
    counters.count = static_cast<int32_t>(std::min<size_t>(kMaxCounters, steps.size() - first));
    std::copy_n(steps.begin() + first, counters.count, counters.steps);
    const int blocks = (counters.count - 1) / kThreads + 1;
    launch(op, count_kernel, blocks, kThreads, false, stream, counters, beta1, beta2, found_inf,
           corrections);
  }
}

void adamw_step(const Tensor& ticket, const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                const std::vector<Tensor>& steps, const Tensor& lr, double beta1, double beta2,
                double eps, double weight_decay, bool maximize, const std::optional<Tensor>& mask,
                const std::optional<Tensor>& lam, const std::optional<Tensor>& factor,
                bool squares_known, const std::optional<Tensor>& grad_scale,
                const std::optional<Tensor>& found_inf) {
  constexpr const char* kOp = "adamw_step_";
  const LockedBound bound(kOp, ticket);
  const StepArguments step = check_step(kOp, *bound, grads, lr, maximize, mask, lam, factor,
                                        squares_known, grad_scale, found_inf);
  const AdamwArguments a = check_adamw(kOp, *bound, step, exp_avgs, exp_avg_sqs, steps, beta1, beta2);
  const OnDevice here(kOp, bound->tables);
  Adamw rule{};
  rule.in_double = {beta1, 1 - beta1, beta2, 1 - beta2, eps};
  rule.in_float = {static_cast<float>(beta1), static_cast<float>(1 - beta1), static_cast<float>(beta2),
                   static_cast<float>(1 - beta2), static_cast<float>(eps)};
  rule.weight_decay = weight_decay;
  auto* const corrections = static_cast<BiasCorrection*>(bound->bias_corrections.mutable_data_ptr());
  rule.corrections = corrections;
  count_step(kOp, a.steps, step.found_inf, beta1, beta2, corrections, here.stream());
  take_step(kOp, *bound, step, {&a.averages, &a.squares}, a, rule, here.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw_step));
}

}  // namespace ocsfast::cuda
