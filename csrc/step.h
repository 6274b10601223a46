// The arguments of the ops that take an optimizer's step. Host only.
#pragma once

#include <optional>
#include <vector>

#include "bound.h"

namespace ocsfast {

// What they have in common: gradients (null: none, the weight takes no step), and the penalty.
struct Step {
  std::vector<void*> grads;
  const double* lr;  // scalars lie where the weights do
  const bool* mask;  // [groups]; null: no penalty
  const float* strength;
  const float* factor;
  bool maximize;
  bool known;               // the slices' sums of squares are at hand
  const float* grad_scale;  // what gradients are divided by; null: 1
  const float* found_inf;   // not 0: nothing is stepped and nothing shrunk; null: 0
};
Step check_step(const char* op, const Bound& bound, const std::vector<Tensor>& grads, const Tensor& lr,
                bool maximize, const std::optional<Tensor>& mask, const Tensor& strength,
                const Tensor& factor, bool known, const std::optional<Tensor>& grad_scale,
                const std::optional<Tensor>& found_inf);

struct SgdArguments {
  std::vector<void*> momenta;
  std::vector<uint8_t> first;  // whether the momentum has yet to begin
};
SgdArguments check_sgd(const char* op, const Bound& bound, const Step& step,
                       const std::vector<Tensor>& momenta, const std::vector<int64_t>& first,
                       double momentum);

struct AdamwArguments {
  std::vector<void*> averages, squares;
  std::vector<float*> steps;  // where the weights lie: how many each has taken; null: it takes none
};
AdamwArguments check_adamw(const char* op, const Bound& bound, const Step& step,
                           const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                           const std::vector<Tensor>& steps, double beta1, double beta2);

}  // namespace ocsfast
