#include "../adamw.h"
#include "ptx.cuh"
#include "step.cuh"

namespace ocsfast::cuda {
namespace {

template <class C>
struct Rates {
  C beta1, gain1, beta2, gain2, eps;
};

// A quotient and a root to one or two units in the last place: of a change that is small beside its
// weight. Exact ones take registers and branches, and more instructions than half precision has time
// for.
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
  static constexpr int kStates = 2, kTensors = std::min(1344, kMostTensors);  // three pointers each

  Rates<float> single;
  Rates<double> wide;
  double weight_decay;
  const Correction* corrections;  // [tensors] on the device

  template <class C>
  struct Of {
    C left, rate, scale;  // left: of the weight, by its decay
  };
  template <class C>
  __device__ const Rates<C>& rates() const {
    if constexpr (std::is_same_v<C, double>) {
      return wide;
    } else {
      return single;
    }
  }
  template <class C>
  __device__ C slope() const {
    return C(0);
  }
  template <class C>
  __device__ Of<C> of(const Work&, int32_t tensor, double lr) const {
    const Correction correction = corrections[tensor];
    return {static_cast<C>(1 - lr * weight_decay), static_cast<C>(lr * correction.average),
            static_cast<C>(correction.root_square)};
  }
  // By the averages as they are before they are stored: a square that half precision cannot hold would
  // divide by next to nothing.
  template <class T, class C>
  __device__ C move(C before, C change, const Of<C>& of, T* states, bool) const {
    const Rates<C>& r = rates<C>();
    const C average = to_number(states[0]) * r.beta1 + change * r.gain1;
    const C square = to_number(states[1]) * r.beta2 + change * change * r.gain2;
    states[0] = from_number<T>(average);
    states[1] = from_number<T>(square);
    return before * of.left - divide(average * of.rate, root(square) * of.scale + r.eps);
  }

  void load(const AdamwArguments&, int32_t, int32_t) {}
};

// Pointers of a launch: as many as its argument holds.
constexpr int kCounters = std::min(4000, 2 * kMostTensors);
struct Counters {
  float* of[kCounters];  // null: the weight takes no step
  int32_t first, count;
};

// Counts the step that is about to be taken, and what follows for each weight from how many there were:
// in a launch of its own, because in the next one every thread asks for it.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ Counters counters, double beta1, double beta2,
                 const float* found_inf, Correction* corrections) {
  const int32_t t = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x);
  if (t >= counters.count || !counters.of[t] || (found_inf && *found_inf != 0)) return;
  const float steps = *counters.of[t] + 1;
  *counters.of[t] = steps;
  corrections[counters.first + t] = correction_of(beta1, beta2, steps);
}

void count_step(const char* op, const std::vector<float*>& steps, const float* found_inf, double beta1,
                double beta2, Correction* corrections, cudaStream_t stream) {
  Counters counters{};
  for (size_t first = 0; first < steps.size(); first += kCounters) {
    counters.first = static_cast<int32_t>(first);
    counters.count = static_cast<int32_t>(std::min<size_t>(kCounters, steps.size() - first));
    std::copy_n(steps.begin() + first, counters.count, counters.of);
    const int blocks = (counters.count - 1) / kThreads + 1;
    launch(op, count_kernel, blocks, kThreads, false, stream, counters, beta1, beta2, found_inf,
           corrections);
  }
}

void adamw_step(const Tensor& ticket, const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                const std::vector<Tensor>& steps, const Tensor& lr, double beta1, double beta2,
                double eps, double weight_decay, bool maximize, const std::optional<Tensor>& mask,
                const Tensor& lam, const Tensor& factor, bool known,
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  constexpr const char* kOp = "adamw_step_";
  const LockedBound bound(kOp, ticket);
  const StepArguments step =
      check_step(kOp, *bound, grads, lr, maximize, mask, lam, factor, known, grad_scale, found_inf);
  const AdamwArguments a = check_adamw(kOp, *bound, step, exp_avgs, exp_avg_sqs, steps, beta1, beta2);
  const OnDevice here(kOp, bound->tables);
  Adamw rule{};
  rule.wide = {beta1, 1 - beta1, beta2, 1 - beta2, eps};
  rule.single = {static_cast<float>(beta1), static_cast<float>(1 - beta1), static_cast<float>(beta2),
                 static_cast<float>(1 - beta2), static_cast<float>(eps)};
  rule.weight_decay = weight_decay;
  auto* const corrections = static_cast<Correction*>(bound->bias_corrections.mutable_data_ptr());
  rule.corrections = corrections;
  count_step(kOp, a.steps, step.found_inf, beta1, beta2, corrections, here.stream());
  take_step(kOp, *bound, step, {&a.averages, &a.squares}, a, rule, here.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw_step));
}

}  // namespace ocsfast::cuda
