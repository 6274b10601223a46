#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"

namespace ocsfast::cpu {
namespace {

Tensor jaccard(const Tensor& mask_a, const Tensor& mask_b, const Tensor& tables,
               const std::vector<int64_t>& layout) {
  constexpr const char* kOp = "jaccard";
  const auto& [plan, a, b] = check_jaccard(kOp, mask_a, mask_b, tables, layout);
  double sum = 0;
  int64_t layers = 0;
  for (int32_t f = 0; f < plan.families; ++f) {
    int64_t both = 0, either = 0;
    for (int32_t g = plan.family_start[f]; g < plan.family_start[f + 1]; ++g) {
      both += !a[g] && !b[g];
      either += !a[g] || !b[g];
    }
    const double alike = either ? static_cast<double>(both) / static_cast<double>(either) : 1.0;
    sum += alike * plan.family_layers[f];
    layers += plan.family_layers[f];
  }
  Tensor result = torch::stable::new_empty(tables, {}, ScalarType::Double);
  *result.mutable_data_ptr<double>() = layers ? sum / static_cast<double>(layers) : 1.0;
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("jaccard", TORCH_BOX(&jaccard));
}

}  // namespace ocsfast::cpu
