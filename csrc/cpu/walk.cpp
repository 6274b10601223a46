#include "walk.h"

#include <cstring>

namespace ocsfast::cpu {

bool prunes_any(const Penalty& penalty, const Plan& plan) {
  return penalty.mask && plan.groups > 0 && std::memchr(penalty.mask, 1, plan.groups);
}

std::vector<double> compute_slopes(const Bound& bound, const bool* mask, double lam) {
  const Plan& plan = bound.plan;
  const auto* squares = bound.slice_sq.const_data_ptr<double>();
  std::vector<double> slopes(plan.slices);
  torch::stable::parallel_for(0, plan.slices, kSlicesPerTask, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const double slope = lam / std::sqrt(squares[s]);
      slopes[s] = mask[plan.slice_group[s]] && squares[s] != 0 ? slope : 0.0;
    }
  });
  return slopes;
}

}  // namespace ocsfast::cpu
