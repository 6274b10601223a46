#include "step.cuh"

namespace ocsfast::cuda {
namespace {

template <class C>
struct Rates {
  C momentum, gain, weight_decay;  // gain: 1 - dampening
};

struct Sgd {
  static constexpr int kStates = 1, kTensors = kMostTensors;
  static constexpr int kWordBits = 32;

  Rates<float> single;
  Rates<double> wide;
  bool nesterov;
  uint32_t first[kTensors / kWordBits + 1];  // bits: of the launch's tensors, whose momentum begins

  template <class C>
  struct Of {
    C lr;
    bool begins;
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
    return rates<C>().weight_decay;
  }
  template <class C>
  __device__ Of<C> of(const Work& work, int32_t tensor, double lr) const {
    const int32_t own = tensor - work.first_tensor;
    return {static_cast<C>(lr), static_cast<bool>(first[own / kWordBits] >> own % kWordBits & 1)};
  }
  template <class T, class C>
  __device__ C move(C before, C change, const Of<C>& of, T* states, bool has_states) const {
    if (has_states) {
      const Rates<C>& r = rates<C>();
      const C moved = of.begins ? change : to_number(states[0]) * r.momentum + change * r.gain;
      states[0] = from_number<T>(moved);
      const C stored = to_number(states[0]);
      change = nesterov ? change + stored * r.momentum : stored;
    }
    return before - change * of.lr;
  }

  void load(const SgdArguments& a, int32_t first_tensor, int32_t tensors) {
    std::fill(std::begin(first), std::end(first), 0u);
    for (int32_t t = 0; t < tensors; ++t) {
      if (a.begins[first_tensor + t]) first[t / kWordBits] |= 1u << t % kWordBits;
    }
  }
};

void sgd_step(const Tensor& ticket, const std::vector<Tensor>& grads, const std::vector<Tensor>& momenta,
              const std::vector<int64_t>& first, const Tensor& lr, double momentum, double dampening,
              double weight_decay, bool nesterov, bool maximize, const std::optional<Tensor>& mask,
              const Tensor& lam, const Tensor& factor, bool known,
              const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  constexpr const char* kOp = "sgd_step_";
  const LockedBound bound(kOp, ticket);
  const StepArguments step =
      check_step(kOp, *bound, grads, lr, maximize, mask, lam, factor, known, grad_scale, found_inf);
  const SgdArguments a = check_sgd(kOp, *bound, step, momenta, first, momentum);
  Sgd rule{};
  rule.wide = {momentum, 1 - dampening, weight_decay};
  rule.single = {static_cast<float>(momentum), static_cast<float>(1 - dampening),
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
