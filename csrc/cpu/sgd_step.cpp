#include <torch/csrc/stable/library.h>

#include "optimizer_step.h"

namespace ocsfast::cpu {
namespace {

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
  take_step(*bound, step, {&a.momenta}, [&](const auto& bands, int32_t tensor) {
    using T = std::remove_reference_t<decltype(*bands.w)>;
    using A = accumulator_t<T>;
    const bool begins = a.begins[tensor];
    const SgdScalars<A> scalars{static_cast<A>(step.lr.get()),
                                static_cast<A>(momentum),
                                begins ? A(1) : static_cast<A>(1 - dampening),
                                static_cast<A>(weight_decay),
                                gradient_multiplier<A>(step),
                                nesterov,
                                begins};
    row_kernels<T>().sgd(bands, scalars);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("sgd_step_", TORCH_BOX(&sgd_step));
}

}  // namespace ocsfast::cpu
