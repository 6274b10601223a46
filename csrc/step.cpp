#include "step.h"

#include <cmath>

namespace ocsfast {

Step check_step(const char* op, const Bound& bound, const std::vector<Tensor>& grads, const Tensor& lr,
                bool maximize, const std::optional<Tensor>& mask, const Tensor& strength,
                const Tensor& factor, bool known) {
  std::vector<void*> pointers = pointers_beside(op, "grads", grads, bound);
  check_array(op, lr, {"lr", ScalarType::Double, 1, 0}, bound.tables);
  check_array(op, strength, {"strength", ScalarType::Float, 1, 0}, bound.tables);
  check_array(op, factor, {"factor", ScalarType::Float, 1, 0}, bound.tables);
  if (mask) check_array(op, *mask, {"mask", ScalarType::Bool, bound.plan.groups, 1}, bound.tables);
  return {std::move(pointers),
          lr.const_data_ptr<double>(),
          mask ? mask->const_data_ptr<bool>() : nullptr,
          strength.const_data_ptr<float>(),
          factor.const_data_ptr<float>(),
          maximize,
          known};
}

SgdArguments check_sgd(const char* op, const Bound& bound, const Step& step,
                       const std::vector<Tensor>& momenta, const std::vector<int64_t>& first,
                       double momentum) {
  SgdArguments a{pointers_beside(op, "momenta", momenta, bound),
                 std::vector<uint8_t>(bound.weights.size())};
  for (const int64_t t : first) {
    if (t < 0 || t >= bound.plan.tensors) fail(op, "first holds ", t, " of ", bound.plan.tensors);
    a.first[t] = true;
  }
  for (size_t t = 0; t < step.grads.size(); ++t) {
    const bool wanted = momentum != 0 && step.grads[t];
    if (wanted != static_cast<bool>(a.momenta[t]) && (wanted || momentum == 0)) {
      fail(op, "momenta[", t, "] is ", wanted ? "missing" : "given, but momentum is 0");
    }
  }
  return a;
}

AdamwArguments check_adamw(const char* op, const Bound& bound, const Step& step,
                           const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                           const std::vector<int64_t>& steps, double beta1, double beta2) {
  AdamwArguments a{pointers_beside(op, "exp_avgs", exp_avgs, bound),
                   pointers_beside(op, "exp_avg_sqs", exp_avg_sqs, bound),
                   std::vector<Correction>(bound.weights.size())};
  if (!(beta1 >= 0 && beta1 < 1)) fail(op, "beta1 is ", beta1, ", expected 0 or more and below 1");
  if (!(beta2 >= 0 && beta2 < 1)) fail(op, "beta2 is ", beta2, ", expected 0 or more and below 1");
  if (steps.size() != bound.weights.size()) {
    fail(op, steps.size(), " steps, the plan has ", bound.weights.size(), " weights");
  }
  for (size_t t = 0; t < steps.size(); ++t) {
    if (!step.grads[t]) continue;
    if (!a.averages[t]) fail(op, "exp_avgs[", t, "] is missing");
    if (!a.squares[t]) fail(op, "exp_avg_sqs[", t, "] is missing");
    if (steps[t] < 1) fail(op, "steps[", t, "] is ", steps[t], ", expected 1 or more");
    const auto count = static_cast<double>(steps[t]);
    a.corrections[t] = {1 / (1 - std::pow(beta1, count)), 1 / std::sqrt(1 - std::pow(beta2, count))};
  }
  return a;
}

}  // namespace ocsfast
