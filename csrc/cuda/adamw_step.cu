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
  float result;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
__device__ inline double root(double v) {
  return sqrt(v);
}

struct Adamw {
  // Three pointers and a Correction each have to go by value.
  static constexpr int kStates = 2, kTensors = 800;

  Rates<float> single;
  Rates<double> wide;
  double weight_decay;
  Correction corrections[kTensors];

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
  __device__ Of<C> of(int32_t own, double lr) const {
    return {static_cast<C>(1 - lr * weight_decay), static_cast<C>(lr * corrections[own].average),
            static_cast<C>(corrections[own].root_square)};
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

  void load(const AdamwArguments& a, int32_t first_tensor, int32_t tensors) {
    std::copy_n(a.corrections.begin() + first_tensor, tensors, corrections);
  }
};

void adamw_step(const Tensor& ticket, const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                const std::vector<int64_t>& steps, const Tensor& lr, double beta1, double beta2,
                double eps, double weight_decay, bool maximize, const std::optional<Tensor>& mask,
                const Tensor& strength, const Tensor& factor, bool known) {
  constexpr const char* kOp = "adamw_step_";
  const Use bound(kOp, ticket);
  const Step step = check_step(kOp, *bound, grads, lr, maximize, mask, strength, factor, known);
  const AdamwArguments a = check_adamw(kOp, *bound, step, exp_avgs, exp_avg_sqs, steps, beta1, beta2);
  Adamw rule{};
  rule.wide = {beta1, 1 - beta1, beta2, 1 - beta2, eps};
  rule.single = {static_cast<float>(beta1), static_cast<float>(1 - beta1), static_cast<float>(beta2),
                 static_cast<float>(1 - beta2), static_cast<float>(eps)};
  rule.weight_decay = weight_decay;
  take_step(kOp, *bound, step, {&a.averages, &a.squares}, a, rule);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw_step));
}

}  // namespace ocsfast::cuda
