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
  bool known;  // the slices' sums of squares are at hand
};
Step check_step(const char* op, const Bound& bound, const std::vector<Tensor>& grads, const Tensor& lr,
                bool maximize, const std::optional<Tensor>& mask, const Tensor& strength,
                const Tensor& factor, bool known);

struct SgdArguments {
  std::vector<void*> momenta;
  std::vector<uint8_t> first;  // whether the momentum has yet to begin
};
SgdArguments check_sgd(const char* op, const Bound& bound, const Step& step,
                       const std::vector<Tensor>& momenta, const std::vector<int64_t>& first,
                       double momentum);

// Of the averages of a weight that has been stepped so often: they began at 0.
struct Correction {
  double average;      // 1 / (1 - beta1 ** steps)
  double root_square;  // 1 / sqrt(1 - beta2 ** steps)
};

struct AdamwArguments {
  std::vector<void*> averages, squares;
  std::vector<Correction> corrections;
};
AdamwArguments check_adamw(const char* op, const Bound& bound, const Step& step,
                           const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                           const std::vector<int64_t>& steps, double beta1, double beta2);

}  // namespace ocsfast
