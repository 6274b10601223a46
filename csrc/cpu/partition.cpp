#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "../cost.h"
#include "../order.h"

namespace ocsfast::cpu {
namespace {

// The cost where family f keeps kept[f] groups. axis: [axes] scratch.
int64_t compute_cost(const CostModel& cost, const std::vector<int64_t>& kept,
                     std::vector<int64_t>& axis) {
  for (int32_t a = 0; a < cost.axes; ++a) axis[a] = axis_size(cost, a, kept.data());
  int64_t sum = 0;
  for (int32_t k = 0; k < cost.terms; ++k) sum += term_cost(cost, k, axis.data());
  for (int32_t k = 0; k < cost.lookups; ++k) sum += lookup_cost(cost, k, axis.data());
  return sum;
}

// Groups in ascending order of score, then of index.
template <class Score>
std::vector<int32_t> ascending(const Score* scores, int32_t groups) {
  using Image = decltype(order_image(Score{}));
  // Radix sort, from the lowest digit: ten times as fast as std::sort with half a million groups. With
  // fewer than kFew its counters would cost more than they save.
  constexpr int kDigitBits = 11;
  constexpr int32_t kDigits = 1 << kDigitBits;
  constexpr int32_t kFew = 1024;
  using Entry = std::pair<Image, int32_t>;
  std::vector<Entry> entries(groups), sorted;
  for (int32_t g = 0; g < groups; ++g) entries[g] = {order_image(scores[g]), g};
  if (groups <= kFew) {
    std::sort(entries.begin(), entries.end());
  } else {
    sorted.resize(groups);
    for (unsigned shift = 0; shift < 8 * sizeof(Image); shift += kDigitBits) {
      std::array<int32_t, kDigits> start{};
      const auto digit = [&](const Entry& e) { return (e.first >> shift) & (kDigits - 1); };
      for (const Entry& e : entries) ++start[digit(e)];
      std::exclusive_scan(start.begin(), start.end(), start.begin(), 0);
      for (const Entry& e : entries) sorted[start[digit(e)]++] = e;
      entries.swap(sorted);
    }
  }
  std::vector<int32_t> order(groups);
  for (int32_t p = 0; p < groups; ++p) order[p] = entries[p].second;
  return order;
}

template <class Score>
class Partition {
 public:
  Partition(const Plan& plan, const CostModel& cost, const Score* scores, const int64_t* limits,
            int64_t round_to)
      : plan_(plan),
        cost_(cost),
        limits_(limits),
        round_to_(round_to),
        kept_(plan.families),
        axis_(cost.axes),
        order_(ascending(scores, plan.groups)) {
    std::vector<int32_t> family(plan.groups);
    for (int32_t f = 0; f < plan.families; ++f) {
      std::fill(family.begin() + plan.family_start[f], family.begin() + plan.family_start[f + 1], f);
    }
    // The groups of each family in ascending order, as positions in the order of all groups.
    position_.resize(plan.groups);
    std::vector<int32_t> next(plan.family_start, plan.family_start + plan.families);
    for (int32_t p = 0; p < plan.groups; ++p) position_[next[family[order_[p]]]++] = p;
  }

  // How many groups of family f are pruned if only the `threshold` lowest of all groups may be.
  int64_t pruned(int32_t f, int32_t threshold) const {
    const auto begin = position_.begin() + plan_.family_start[f];
    const auto end = position_.begin() + plan_.family_start[f + 1];
    return groups_to_prune(end - begin, std::lower_bound(begin, end, threshold) - begin, limits_[f],
                           round_to_);
  }

  int64_t cost(int32_t threshold) {
    for (int32_t f = 0; f < plan_.families; ++f) {
      kept_[f] = plan_.family_start[f + 1] - plan_.family_start[f] - pruned(f, threshold);
    }
    return compute_cost(cost_, kept_, axis_);
  }

  // The smallest threshold whose cost is at most the budget; if there is none, all groups.
  int32_t search(int64_t budget) {
    int32_t low = 0, high = plan_.groups;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (cost(middle) <= budget) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  void write(int32_t threshold, bool* mask) const {
    for (int32_t f = 0; f < plan_.families; ++f) {
      const int64_t n = pruned(f, threshold);
      for (int64_t k = 0; k < n; ++k) mask[order_[position_[plan_.family_start[f] + k]]] = true;
    }
  }

 private:
  const Plan& plan_;
  const CostModel& cost_;
  const int64_t* limits_;
  int64_t round_to_;
  std::vector<int64_t> kept_, axis_;  // scratch of `cost`
  std::vector<int32_t> order_;        // [groups] all groups in ascending order
  std::vector<int32_t> position_;     // [groups] family by family, positions in order_
};

template <class Score>
std::pair<int64_t, int32_t> run(const Plan& plan, const CostModel& cost, const Score* scores,
                                const int64_t* limits, int64_t round_to, int64_t budget, bool* mask) {
  std::fill_n(mask, plan.groups, false);
  if (std::any_of(scores, scores + plan.groups, [](Score s) { return std::isnan(s); })) {
    std::vector<int64_t> kept(plan.families), axis(cost.axes);
    for (int32_t f = 0; f < plan.families; ++f)
      kept[f] = plan.family_start[f + 1] - plan.family_start[f];
    return {compute_cost(cost, kept, axis), kNanScore};
  }
  Partition<Score> partition(plan, cost, scores, limits, round_to);
  const int32_t threshold = partition.search(budget);
  partition.write(threshold, mask);
  const int64_t reached = partition.cost(threshold);
  return {reached, reached <= budget ? 0 : kUnreachable};
}

std::tuple<Tensor, Tensor, Tensor> partition(const Tensor& scores, const Tensor& tables,
                                             const std::vector<int64_t>& layout,
                                             const Tensor& cost_tables,
                                             const std::vector<int64_t>& cost_layout,
                                             const Tensor& limits, int64_t round_to,
                                             const Tensor& budget) {
  constexpr const char* kOp = "partition";
  const auto& [plan, cost] =
      check_partition(kOp, scores, tables, layout, cost_tables, cost_layout, limits, round_to, budget);
  Tensor mask = torch::stable::new_empty(tables, {plan.groups}, ScalarType::Bool);
  Tensor reached = torch::stable::new_empty(tables, {}, ScalarType::Long);
  Tensor status = torch::stable::new_empty(tables, {}, ScalarType::Int);
  const auto* limit = limits.const_data_ptr<int64_t>();
  const int64_t highest = *budget.const_data_ptr<int64_t>();
  auto* masked = mask.mutable_data_ptr<bool>();
  const auto [value, bits] =
      scores.scalar_type() == ScalarType::Double
          ? run(plan, cost, scores.const_data_ptr<double>(), limit, round_to, highest, masked)
          : run(plan, cost, scores.const_data_ptr<float>(), limit, round_to, highest, masked);
  *reached.mutable_data_ptr<int64_t>() = value;
  *status.mutable_data_ptr<int32_t>() = bits;
  return {mask, reached, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("partition", TORCH_BOX(&partition));
}

}  // namespace ocsfast::cpu
