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

// Which groups go, as docs/method.md defines it. All counts are of groups that go, a family.
template <class Score>
class Partition {
 public:
  Partition(const PartitionArguments& arguments, const Score* scores)
      : a_(arguments),
        plan_(arguments.plan),
        held_(plan_.families, kOpen),
        below_(plan_.families),
        kept_(plan_.families),
        axis_(a_.cost.axes),
        order_(ascending(scores, plan_.groups)) {
    std::vector<int32_t> family(plan_.groups);
    for (int32_t f = 0; f < plan_.families; ++f) {
      std::fill(family.begin() + plan_.family_start[f], family.begin() + plan_.family_start[f + 1], f);
    }
    // The groups of each family in ascending order, as positions in the order of all groups.
    position_.resize(plan_.groups);
    std::vector<int32_t> next(plan_.family_start, plan_.family_start + plan_.families);
    for (int32_t p = 0; p < plan_.groups; ++p) position_[next[family[order_[p]]]++] = p;
  }

  // The cost that is reached; the mask is written.
  int64_t run(bool* mask) {
    int32_t threshold = search(plan_.groups);
    int64_t reached = cost(threshold);
    while (a_.give_back && reached <= *a_.budget && hold()) {
      threshold = search(threshold);
      reached = cost(threshold);
    }
    for (int32_t f = 0; f < plan_.families; ++f) {
      const int64_t n = size(f) - kept_[f];
      for (int64_t k = 0; k < n; ++k) mask[order_[position_[plan_.family_start[f] + k]]] = true;
    }
    return reached;
  }

 private:
  static constexpr int64_t kOpen = -1;

  int64_t size(int32_t f) const { return plan_.family_start[f + 1] - plan_.family_start[f]; }
  int32_t tied(int32_t f) const { return a_.ties ? static_cast<int32_t>(a_.ties[f]) : f; }

  int64_t to_prune(int32_t f, int64_t below) const {
    return groups_to_prune(size(f), below, a_.limits[f], a_.units ? a_.units[f] : 1);
  }

  // The cost if the `threshold` lowest of all groups may go, and of families that are held as many as
  // they are held at. Leaves what each family keeps in kept_.
  int64_t cost(int32_t threshold) {
    std::fill(below_.begin(), below_.end(), 0);
    for (int32_t f = 0; f < plan_.families; ++f) {
      if (held_[f] != kOpen) continue;
      const auto begin = position_.begin() + plan_.family_start[f];
      const auto end = position_.begin() + plan_.family_start[f + 1];
      int64_t& below = below_[tied(f)];
      below = std::max<int64_t>(below, std::lower_bound(begin, end, threshold) - begin);
    }
    for (int32_t f = 0; f < plan_.families; ++f)
      kept_[f] = size(f) - (held_[f] != kOpen ? held_[f] : to_prune(f, below_[tied(f)]));
    return compute_cost(a_.cost, kept_, axis_);
  }

  // The smallest threshold, of at most `high`, whose cost is at most the budget; `high` if none is.
  int32_t search(int32_t high) {
    int32_t low = 0;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (cost(middle) <= *a_.budget) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  // Holds every open family that cannot lose one unit less at this threshold: it would be held as soon
  // as the threshold fell to its next group, as the cost only rises until then. kept_ is of the
  // threshold. Whether a family is still open.
  bool hold() {
    bool open = false;
    const std::vector<int64_t> kept = kept_;
    for (int32_t root = 0; root < plan_.families; ++root) {
      if (held_[root] != kOpen || tied(root) != root) continue;
      const int64_t gone = size(root) - kept[root];
      const auto set = [&](std::vector<int64_t>& counts, int64_t value) {
        for (int32_t f = root; f < (a_.ties ? plan_.families : root + 1); ++f)
          if (tied(f) == root) counts[f] = value;
      };
      if (gone > 0) {
        set(kept_, size(root) - to_prune(root, gone - 1));
        const bool fits = compute_cost(a_.cost, kept_, axis_) <= *a_.budget;
        set(kept_, kept[root]);
        open |= fits;
        if (fits) continue;
      }
      set(held_, gone);
    }
    return open;
  }

  const PartitionArguments& a_;
  const Plan& plan_;
  std::vector<int64_t> held_;         // [families] how many a family that is held loses, or kOpen
  std::vector<int64_t> below_;        // [families] scratch of `cost`
  std::vector<int64_t> kept_, axis_;  // [families], [axes] of the last cost
  std::vector<int32_t> order_;        // [groups] all groups in ascending order
  std::vector<int32_t> position_;     // [groups] family by family, positions in order_
};

template <class Score>
std::pair<int64_t, int32_t> run(const PartitionArguments& a, const Score* scores, bool* mask) {
  const Plan& plan = a.plan;
  std::fill_n(mask, plan.groups, false);
  if (std::any_of(scores, scores + plan.groups, [](Score s) { return std::isnan(s); })) {
    std::vector<int64_t> kept(plan.families), axis(a.cost.axes);
    for (int32_t f = 0; f < plan.families; ++f)
      kept[f] = plan.family_start[f + 1] - plan.family_start[f];
    return {compute_cost(a.cost, kept, axis), kNanScore};
  }
  const int64_t reached = Partition<Score>(a, scores).run(mask);
  return {reached, reached <= *a.budget ? 0 : kUnreachable};
}

std::tuple<Tensor, Tensor, Tensor> partition(const Tensor& scores, const Tensor& tables,
                                             const std::vector<int64_t>& layout,
                                             const Tensor& cost_tables,
                                             const std::vector<int64_t>& cost_layout,
                                             const Tensor& limits, const Tensor& budget,
                                             const std::optional<Tensor>& units,
                                             const std::optional<Tensor>& ties, bool give_back) {
  const PartitionArguments a = check_partition("partition", scores, tables, layout, cost_tables,
                                               cost_layout, limits, budget, units, ties, give_back);
  Tensor mask = torch::stable::new_empty(tables, {a.plan.groups}, ScalarType::Bool);
  Tensor reached = torch::stable::new_empty(tables, {}, ScalarType::Long);
  Tensor status = torch::stable::new_empty(tables, {}, ScalarType::Int);
  auto* masked = mask.mutable_data_ptr<bool>();
  const auto [value, bits] = a.in_double ? run(a, static_cast<const double*>(a.scores), masked)
                                         : run(a, static_cast<const float*>(a.scores), masked);
  *reached.mutable_data_ptr<int64_t>() = value;
  *status.mutable_data_ptr<int32_t>() = bits;
  return {mask, reached, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("partition", TORCH_BOX(&partition));
}

}  // namespace ocsfast::cpu
