#include "checks.h"

#include "bound.h"

namespace ocsfast {
namespace {

const bool* check_mask(const char* op, const char* name, const Tensor& mask, const Plan& plan,
                       const Tensor& tables) {
  check_array(op, mask, {name, ScalarType::Bool, plan.groups, 1}, tables);
  return mask.const_data_ptr<bool>();
}

const float* check_scalar(const char* op, const char* name, const Tensor& scalar, const Tensor& tables) {
  check_array(op, scalar, {name, ScalarType::Float, 1, 0}, tables);
  return scalar.const_data_ptr<float>();
}

// A number for each group, in float or double.
void check_values(const char* op, const char* name, const Tensor& values, const Plan& plan,
                  const Tensor& tables) {
  const bool in_double = values.scalar_type() == ScalarType::Double;
  check_array(op, values, {name, in_double ? ScalarType::Double : ScalarType::Float, plan.groups, 1},
              tables);
}

const Criterion& check_criterion(const char* op, const std::string& name) {
  for (const Criterion& criterion : kCriteria) {
    if (criterion.name == name) return criterion;
  }
  fail(op, "criterion '", name, "' is not known");
}

// Tied families are alike: of one size, limit and unit, they can lose equally many.
void check_ties(const char* op, const PartitionArguments& a) {
  const auto size = [&](int64_t f) { return a.plan.family_start[f + 1] - a.plan.family_start[f]; };
  for (int64_t f = 0; f < a.plan.families; ++f) {
    const int64_t first = a.ties[f];
    if (first < 0 || first > f || a.ties[first] != first)
      fail(op, "ties[", f, "] is ", first, ", expected ", f, " or the first family it is tied to");
    if (size(f) != size(first) || a.limits[f] != a.limits[first])
      fail(op, "ties: families ", first, " and ", f, " have ", size(first), " and ", size(f),
           " groups and may lose ", a.limits[first], " and ", a.limits[f]);
    if (a.units && a.units[f] != a.units[first])
      fail(op, "ties: families ", first, " and ", f, " keep multiples of ", a.units[first], " and ",
           a.units[f]);
  }
}

}  // namespace

int64_t check_ticket(const char* op, const Tensor& ticket) {
  check_array(op, ticket, {"bound", ScalarType::Long, 1, 0}, ticket);
  if (!ticket.is_cpu()) fail(op, "bound must lie on the CPU");
  return *ticket.const_data_ptr<int64_t>();
}

SaliencyArguments check_saliency(const char* op, const Bound& bound, const Tensor& scores,
                                 const Tensor& slices, const std::vector<Tensor>& others,
                                 const std::string& name) {
  const Criterion& criterion = check_criterion(op, name);
  const ScalarType dtype = bound.any_double ? ScalarType::Double : ScalarType::Float;
  check_array(op, scores, {"scores", dtype, bound.plan.groups, 1}, bound.tables);
  check_array(op, slices, {"slices", dtype, bound.plan.slices, 1}, bound.tables);
  if (!criterion.needs_other) return {criterion, {}};
  return {criterion, check_like_weights(op, "others", others, bound)};
}

PartitionArguments check_partition(const char* op, const Tensor& scores, const Tensor& tables,
                                   const std::vector<int64_t>& layout, const Tensor& cost_tables,
                                   const std::vector<int64_t>& cost_layout, const Tensor& limits,
                                   const Tensor& budget, const std::optional<Tensor>& units,
                                   const std::optional<Tensor>& ties, bool give_back) {
  PartitionArguments a{};
  a.plan = check_plan(op, tables, layout);
  check_families(op, a.plan, tables);
  a.cost = check_cost(op, cost_tables, cost_layout, tables, a.plan.families);
  check_values(op, "scores", scores, a.plan, tables);
  check_array(op, limits, {"limits", ScalarType::Long, a.plan.families, 1}, tables);
  check_array(op, budget, {"budget", ScalarType::Long, 1, 0}, tables);
  a.scores = scores.const_data_ptr();
  a.in_double = scores.scalar_type() == ScalarType::Double;
  a.limits = limits.const_data_ptr<int64_t>();
  a.budget = budget.const_data_ptr<int64_t>();
  a.give_back = give_back;
  if (units) {
    check_array(op, *units, {"units", ScalarType::Long, a.plan.families, 1}, tables);
    a.units = units->const_data_ptr<int64_t>();
  }
  if (ties) {
    check_array(op, *ties, {"ties", ScalarType::Long, a.plan.families, 1}, tables);
    a.ties = ties->const_data_ptr<int64_t>();
    if (tables.is_cpu()) check_ties(op, a);
  }
  return a;
}

CompareArguments check_compare(const char* op, const Tensor& mask, const Tensor& sizes,
                               const Tensor& cost, const Tensor& status,
                               const std::optional<Tensor>& first, const std::optional<Tensor>& last,
                               const Tensor& tables, const std::vector<int64_t>& layout) {
  CompareArguments a{};
  a.plan = check_plan(op, tables, layout);
  check_families(op, a.plan, tables);
  a.mask = check_mask(op, "mask", mask, a.plan, tables);
  check_values(op, "sizes", sizes, a.plan, tables);
  check_array(op, cost, {"cost", ScalarType::Long, 1, 0}, tables);
  check_array(op, status, {"status", ScalarType::Int, 1, 0}, tables);
  a.sizes = sizes.const_data_ptr();
  a.cost = cost.const_data_ptr<int64_t>();
  a.status = status.const_data_ptr<int32_t>();
  a.first = first ? check_mask(op, "first", *first, a.plan, tables) : a.mask;
  a.last = last ? check_mask(op, "last", *last, a.plan, tables) : a.mask;
  return a;
}

ShrinkArguments check_shrink(const char* op, const Bound& bound, const Tensor& mask,
                             const Tensor& factor) {
  const bool* groups = check_mask(op, "mask", mask, bound.plan, bound.tables);
  return {groups, check_number<float>(op, "factor", factor, bound.tables)};
}

LassoArguments check_lasso(const char* op, const Bound& bound, const std::vector<Tensor>& grads,
                           const Tensor& mask, const Tensor& lam) {
  std::vector<void*> pointers = check_like_weights(op, "grads", grads, bound);
  const bool* groups = check_mask(op, "mask", mask, bound.plan, bound.tables);
  return {std::move(pointers), groups, check_number<float>(op, "lam", lam, bound.tables)};
}

StepArguments check_step(const char* op, const Bound& bound, const std::vector<Tensor>& grads,
                         const Tensor& lr, bool maximize, const std::optional<Tensor>& mask,
                         const std::optional<Tensor>& lam, const std::optional<Tensor>& factor,
                         bool squares_known, const std::optional<Tensor>& grad_scale,
                         const std::optional<Tensor>& found_inf) {
  const Tensor& tables = bound.tables;
  StepArguments step{};
  step.grads = check_like_weights(op, "grads", grads, bound);
  step.lr = check_number<double>(op, "lr", lr, tables);
  if (grad_scale) step.grad_scale = check_scalar(op, "grad_scale", *grad_scale, tables);
  if (found_inf) step.found_inf = check_scalar(op, "found_inf", *found_inf, tables);
  if (mask) {
    if (!lam || !factor) fail(op, lam ? "factor" : "lam", " is missing beside a mask");
    step.mask = check_mask(op, "mask", *mask, bound.plan, tables);
    step.lam = check_number<float>(op, "lam", *lam, tables);
    step.factor = check_number<float>(op, "factor", *factor, tables);
  }
  step.maximize = maximize;
  step.squares_known = squares_known;
  return step;
}

SgdArguments check_sgd(const char* op, const Bound& bound, const StepArguments& step,
                       const std::vector<Tensor>& momenta, const std::vector<int64_t>& first,
                       double momentum) {
  SgdArguments sgd{check_like_weights(op, "momenta", momenta, bound),
                   std::vector<uint8_t>(bound.weights.size())};
  for (const int64_t t : first) {
    if (t < 0 || t >= bound.plan.tensors) fail(op, "first holds ", t, " of ", bound.plan.tensors);
    sgd.begins[t] = true;
  }
  for (size_t t = 0; t < step.grads.size(); ++t) {
    const bool wanted = momentum != 0 && step.grads[t];
    if (wanted != static_cast<bool>(sgd.momenta[t]) && (wanted || momentum == 0)) {
      fail(op, "momenta[", t, "] is ", wanted ? "missing" : "given, but momentum is 0");
    }
  }
  return sgd;
}

AdamwArguments check_adamw(const char* op, const Bound& bound, const StepArguments& step,
                           const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                           const std::vector<Tensor>& steps, double beta1, double beta2) {
  AdamwArguments adamw{check_like_weights(op, "exp_avgs", exp_avgs, bound),
                       check_like_weights(op, "exp_avg_sqs", exp_avg_sqs, bound),
                       std::vector<float*>(bound.weights.size())};
  if (!(beta1 >= 0 && beta1 < 1)) fail(op, "beta1 is ", beta1, ", expected 0 or more and below 1");
  if (!(beta2 >= 0 && beta2 < 1)) fail(op, "beta2 is ", beta2, ", expected 0 or more and below 1");
  if (steps.size() != bound.weights.size()) {
    fail(op, steps.size(), " steps, the plan has ", bound.weights.size(), " weights");
  }
  Form count = form_of(bound.tables);
  count.sizes = count.strides = {};
  count.dtype = aoti_torch_dtype_float32();
  for (size_t t = 0; t < steps.size(); ++t) {
    if (!step.grads[t]) continue;
    if (!adamw.averages[t]) fail(op, "exp_avgs[", t, "] is missing");
    if (!adamw.squares[t]) fail(op, "exp_avg_sqs[", t, "] is missing");
    if (!has_form(steps[t], count)) {
      const std::string name = "steps[" + std::to_string(t) + ']';
      check_array(op, steps[t], {name.c_str(), ScalarType::Float, 1, 0}, bound.tables);
    }
    adamw.steps[t] = static_cast<float*>(steps[t].mutable_data_ptr());
  }
  return adamw;
}

}  // namespace ocsfast
