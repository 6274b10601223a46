#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "../checks.h"

namespace ocsfast::cpu {
namespace {

// Sums that go on beside each other, as one addition waits for the one before it.
constexpr int kLanes = 8;

// Adds up the sizes of a family's groups, and those of the pruned ones.
template <class Size>
std::pair<double, double> add_sizes(const Size* sizes, const bool* mask, int64_t groups) {
  std::array<double, kLanes> all{}, pruned{};
  for (int64_t g = 0; g < groups; g += kLanes) {
    const auto lanes = static_cast<int>(std::min<int64_t>(kLanes, groups - g));
    for (int lane = 0; lane < lanes; ++lane) {
      const std::array<double, 2> addend{0.0, static_cast<double>(sizes[g + lane])};
      all[lane] += addend[1];
      pruned[lane] += addend[mask[g + lane]];  // without a branch, which no processor could foresee
    }
  }
  return {std::accumulate(all.begin(), all.end(), 0.0),
          std::accumulate(pruned.begin(), pruned.end(), 0.0)};
}

template <class Size>
void run(const CompareArguments& a, double* facts) {
  const Plan& plan = a.plan;
  const auto* sizes = static_cast<const Size*>(a.sizes);
  double alike = 0, pruned_size = 0, size = 0;
  int64_t layers = 0, all_pruned = 0, all_changed = 0;
  for (int32_t f = 0; f < plan.families; ++f) {
    const int32_t begin = plan.family_start[f], end = plan.family_start[f + 1];
    int32_t pruned = 0, changed = 0, one_pruned = 0, both_pruned = 0;
    for (int32_t g = begin; g < end; ++g) {
      pruned += a.mask[g];
      changed += a.mask[g] ^ a.last[g];
      one_pruned += a.mask[g] | a.first[g];
      both_pruned += a.mask[g] & a.first[g];
    }
    const int32_t both = end - begin - one_pruned, either = end - begin - both_pruned;  // kept
    alike += (either ? static_cast<double>(both) / either : 1.0) * plan.family_layers[f];
    layers += plan.family_layers[f];
    all_pruned += pruned;
    all_changed += changed;
    const auto [of_all, of_pruned] = add_sizes(sizes + begin, a.mask + begin, end - begin);
    size += of_all;
    pruned_size += of_pruned;
    facts[kFacts + f] = end - begin - pruned;
  }
  facts[0] = static_cast<double>(*a.cost);
  facts[1] = *a.status;
  facts[2] = static_cast<double>(all_pruned);
  facts[3] = pruned_size;
  facts[4] = size;
  facts[5] = layers ? alike / static_cast<double>(layers) : 1.0;
  facts[6] = static_cast<double>(all_changed);
}

Tensor compare(const Tensor& mask, const Tensor& sizes, const Tensor& cost, const Tensor& status,
               const std::optional<Tensor>& first, const std::optional<Tensor>& last,
               const Tensor& tables, const std::vector<int64_t>& layout) {
  constexpr const char* kOp = "compare";
  const CompareArguments a = check_compare(kOp, mask, sizes, cost, status, first, last, tables, layout);
  Tensor facts = torch::stable::new_empty(tables, {kFacts + a.plan.families}, ScalarType::Double);
  auto* const out = facts.mutable_data_ptr<double>();
  if (sizes.scalar_type() == ScalarType::Double) {
    run<double>(a, out);
  } else {
    run<float>(a, out);
  }
  return facts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("compare", TORCH_BOX(&compare));
}

}  // namespace ocsfast::cpu
