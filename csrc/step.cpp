#include "step.h"

#include <string>

namespace ocsfast {

Step check_step(const char* op, const Bound& bound, const std::vector<Tensor>& grads, const Tensor& lr,
                bool maximize, const std::optional<Tensor>& mask, const Tensor& strength,
                const Tensor& factor, bool known, const std::optional<Tensor>& grad_scale,
                const std::optional<Tensor>& found_inf) {
  std::vector<void*> pointers = pointers_beside(op, "grads", grads, bound);
  check_array(op, lr, {"lr", ScalarType::Double, 1, 0}, bound.tables);
  check_array(op, strength, {"strength", ScalarType::Float, 1, 0}, bound.tables);
  check_array(op, factor, {"factor", ScalarType::Float, 1, 0}, bound.tables);
  const auto scalar = [&](const char* name, const std::optional<Tensor>& tensor) -> const float* {
    if (!tensor) return nullptr;
    check_array(op, *tensor, {name, ScalarType::Float, 1, 0}, bound.tables);
    return tensor->const_data_ptr<float>();
  };
  const float* scale = scalar("grad_scale", grad_scale);
  const float* overflow = scalar("found_inf", found_inf);
  if (mask) check_array(op, *mask, {"mask", ScalarType::Bool, bound.plan.groups, 1}, bound.tables);
  return {std::move(pointers),
          lr.const_data_ptr<double>(),
          mask ? mask->const_data_ptr<bool>() : nullptr,
          strength.const_data_ptr<float>(),
          factor.const_data_ptr<float>(),
          maximize,
          known,
          scale,
          overflow};
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
                           const std::vector<Tensor>& steps, double beta1, double beta2) {
  AdamwArguments a{pointers_beside(op, "exp_avgs", exp_avgs, bound),
                   pointers_beside(op, "exp_avg_sqs", exp_avg_sqs, bound),
                   std::vector<float*>(bound.weights.size())};
  if (!(beta1 >= 0 && beta1 < 1)) fail(op, "beta1 is ", beta1, ", expected 0 or more and below 1");
  if (!(beta2 >= 0 && beta2 < 1)) fail(op, "beta2 is ", beta2, ", expected 0 or more and below 1");
  if (steps.size() != bound.weights.size()) {
    fail(op, steps.size(), " steps, the plan has ", bound.weights.size(), " weights");
  }
  for (size_t t = 0; t < steps.size(); ++t) {
    if (!step.grads[t]) continue;
    if (!a.averages[t]) fail(op, "exp_avgs[", t, "] is missing");
    if (!a.squares[t]) fail(op, "exp_avg_sqs[", t, "] is missing");
    const std::string name = "steps[" + std::to_string(t) + ']';
    check_array(op, steps[t], {name.c_str(), ScalarType::Float, 1, 0}, bound.tables);
    a.steps[t] = static_cast<float*>(steps[t].mutable_data_ptr());
  }
  return a;
}

}  // namespace ocsfast
