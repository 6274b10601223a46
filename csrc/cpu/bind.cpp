#include <torch/csrc/stable/library.h>

#include "../bound.h"

namespace ocsfast::cpu {
namespace {

Tensor bind(const std::vector<Tensor>& weights, const Tensor& tables, const Tensor& shapes,
            const std::vector<int64_t>& layout) {
  return issue_ticket(make_bound(weights, tables, shapes, layout, Backend::kCpu), shapes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("bind", TORCH_BOX(&bind));
}

}  // namespace ocsfast::cpu
