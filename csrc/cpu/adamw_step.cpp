#include <torch/csrc/stable/library.h>

#include "../adamw.h"
#include "optimizer_step.h"

namespace ocsfast::cpu {
namespace {

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
  std::vector<BiasCorrection> corrections(a.steps.size());
  for (size_t t = 0; t < a.steps.size(); ++t) {
    if (!a.steps[t] || is_skipped(step)) continue;
    *a.steps[t] += 1;
    corrections[t] = bias_correction(beta1, beta2, *a.steps[t]);
  }
  take_step(*bound, step, {&a.averages, &a.squares}, [&](const auto& bands, int32_t tensor) {
    using T = std::remove_reference_t<decltype(*bands.w)>;
    using A = accumulator_t<T>;
    const BiasCorrection& correction = corrections[tensor];
    const AdamwScalars<A> scalars{static_cast<A>(beta1),
                                  static_cast<A>(1 - beta1),
                                  static_cast<A>(beta2),
                                  static_cast<A>(1 - beta2),
                                  static_cast<A>(1 - step.lr.get() * weight_decay),
                                  static_cast<A>(step.lr.get() * correction.average),
                                  static_cast<A>(correction.root_square),
                                  static_cast<A>(eps),
                                  gradient_multiplier<A>(step)};
    row_kernels<T>().adamw(bands, scalars);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw_step));
}

}  // namespace ocsfast::cpu
