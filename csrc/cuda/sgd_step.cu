#include "optimizer_step.cuh"

namespace ocsfast::cuda {
namespace {

template <class C>
struct Scalars {
  C momentum, gain, weight_decay;  // gain: 1 - dampening
};

struct Sgd {
  static constexpr int kStates = 1, kTensors = kMaxTensors;
  static constexpr int kWordBits = 32;

  Scalars<float> in_float;
  Scalars<double> in_double;
  bool nesterov;
  // A bit for each tensor of the launch: its momentum holds nothing yet. As bytes they would not fit
  // beside the pointers.
  uint32_t begins[kTensors / kWordBits + 1];

  template <class C>
  struct PerTensor {
    C lr;
    bool begins;
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
    return scalars<C>().weight_decay;
  }
  template <class C>
  __device__ PerTensor<C> per_tensor(const Work& work, int32_t tensor, double lr) const {
    const int32_t own = tensor - work.first_tensor;
    return {static_cast<C>(lr), static_cast<bool>(begins[own / kWordBits] >> own % kWordBits & 1)};
  }
  template <class T, class C, int kCount>
  __device__ void move(C (&weights)[kCount], C (&changes)[kCount], const PerTensor<C>& tensor,
                       Pack<T, kCount>* states, bool has_states) const {
    const Scalars<C>& s = scalars<C>();
    if (has_states) {
      C momenta[kCount];
      unpack(states[0], momenta);
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        momenta[k] = tensor.begins ? changes[k] : momenta[k] * s.momentum + changes[k] * s.gain;
      round_into(states[0], momenta);
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        changes[k] = nesterov ? changes[k] + momenta[k] * s.momentum : momenta[k];
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) weights[k] -= changes[k] * tensor.lr;
  }

  void load(const SgdArguments& a, int32_t first_tensor, int32_t tensors) {
    std::fill(std::begin(begins), std::end(begins), 0u);
    for (int32_t t = 0; t < tensors; ++t) {
      if (a.begins[first_tensor + t]) begins[t / kWordBits] |= 1u << t % kWordBits;
    }
  }
};

void sgd_step(const Tensor& ticket, const std::vector<Tensor>& grads, const std::vector<Tensor>& momenta,
              const std::vector<int64_t>& first, const Tensor& lr, double momentum, double dampening,
              double weight_decay, bool nesterov, bool maximize, const std::optional<Tensor>& mask,
              const std::optional<Tensor>& lam, const std::optional<Tensor>& factor, bool squares_known,
              const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  constexpr const char* kOp = "sgd_step_";
  const LockedBound bound(kOp, ticket);
  const StepArguments step = check_step(kOp, *bound, grads, lr, maximize, mask, lam, factor,
                                        squares_known, grad_scale, found_inf);
  const SgdArguments a = check_sgd(kOp, *bound, step, momenta, first, momentum);
  Sgd rule{};
  rule.in_double = {momentum, 1 - dampening, weight_decay};
  rule.in_float = {static_cast<float>(momentum), static_cast<float>(1 - dampening),
                   static_cast<float>(weight_decay)};
  rule.nesterov = nesterov;
  const OnDevice here(kOp, bound->tables);
  take_step(kOp, *bound, step, {&a.momenta}, a, rule, here.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("sgd_step_", TORCH_BOX(&sgd_step));
}

}  // namespace ocsfast::cuda
