// The partition in one cooperative launch: a radix search, the highest digit first, for the lowest
// threshold within the budget, and then one in each family for the last of its groups to go.
//
// A pass finds the next 8 bits of a threshold. All blocks count their groups, one counter for each value
// of these bits (a bin) and family. Then each block computes what the cost is if the threshold is the
// end of a bin. A barrier of the grid follows either. A search ends where its bin holds one group: of 26
// 000 scores in float32 after 3 passes, as a rule. Only where scores are equal it goes on over the bits
// of the index.
//
// Integers only, whose sums do not depend on the order of atomics.
#include <cooperative_groups.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../order.h"
#include "runtime.h"
#include "warp.cuh"

namespace ocsfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerSm = 2;
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
// The counters of a family: how many groups lie below all bins, the sums of the first, second, … 15th 16
// bins, and the bins. So one load a lane tells how many lie in the bins up to one.
constexpr int kCoarse = 16;
constexpr int kCounters = kCoarse + kBins;
static_assert(kWarp == 2 * kCoarse && kBins == kCoarse * kCoarse);
// A table is read while the next is written and the one after that is set to 0.
constexpr int kTables = 3;
// A block counts so many families at a time in shared memory. Its groups lie in one or two, as a rule.
constexpr int kWindow = 8;
static_assert(kWindow <= kWarps);
// Digits of a double and of an index.
constexpr int kMaxDigits = sizeof(double) + sizeof(int32_t);
// One block for each bin that may be the threshold's. More would make the barriers longer.
constexpr int kMaxBlocks = kBins;
// Scores that a thread loads before it counts the first of them.
constexpr int kUnroll = 4;
// Families and axes whose counts a block keeps in shared memory. Of more it keeps them in scratch
// memory.
constexpr int64_t kMaxShared = 2048;

// Where a search stands. The digits yet to be found are 0; at its end they are such that groups at or
// below image and index are pruned.
struct Cut {
  uint64_t image;
  uint32_t index;
  int32_t rank;  // of a family: how many of its groups are pruned
  bool open;     // digits are yet to be found
};

struct KernelArguments {
  Plan plan;
  CostModel cost;
  const void* scores;     // [groups] float or double
  const int64_t* limits;  // [families]
  const int64_t* budget;
  int64_t round_to;
  bool* mask;        // [groups] out
  int64_t* reached;  // out: the cost
  int32_t* status;   // out
  // Scratch.
  int64_t* counts;    // [blocks][families + axes] each block's; null: in shared memory
  int64_t* bin_cost;  // [kBins] the cost where the threshold is a bin's end
  int64_t* dense;     // [1] the cost where no group is pruned
  Cut* cuts;          // [2][families]
  int32_t* tables;    // [kTables][families][kCounters]
  int32_t* members;   // [kBins] groups in a bin
  int32_t* lowest;    // [kMaxDigits] by pass: the lowest bin whose end is within the budget
  int32_t* open;      // [kMaxDigits + 1] by pass: families whose search goes on
  int32_t* nan;       // [blocks] whether a block has seen a NaN
};

// Eight bits of a key, which is a score's image and then an index.
struct Digit {
  bool of_image;
  int shift;
};

// What a block counts of a family: its groups from `begin` to `end`, by the next digit of `cut`.
struct Part {
  int32_t begin, end;
  int32_t below;
  Cut cut;
};

struct Shared {
  int32_t bins[kWindow * kBins];
  Part parts[kWindow];
  int64_t sums[kWarps];
  int64_t counts[kMaxShared];
  int32_t first_family;
};

template <class Score>
class Search {
 public:
  __device__ Search(const KernelArguments& a, Shared& shared)
      : a_(a),
        plan_(a.plan),
        shared_(shared),
        scores_(static_cast<const Score*>(a.scores)),
        thread_(static_cast<int>(threadIdx.x)),
        warp_(thread_ / kWarp),
        lane_(thread_ % kWarp) {
    const int64_t share = (plan_.groups + gridDim.x - 1) / gridDim.x;
    begin_ = static_cast<int32_t>(min(blockIdx.x * share, int64_t{plan_.groups}));
    end_ = static_cast<int32_t>(min(begin_ + share, int64_t{plan_.groups}));
    const int64_t counts = int64_t{plan_.families} + a.cost.axes;
    kept_ = a.counts ? a.counts + blockIdx.x * counts : shared.counts;
    axis_ = kept_ + plan_.families;
    while (int64_t{1} << kDigitBits * (digits_ - kImageDigits) < plan_.groups) ++digits_;
  }

  __device__ void run() {
    begin();
    grid_.sync();
    Cut threshold{0, 0, 0, true};
    int pass = 0, bin = 0;
    for (; threshold.open; ++pass) {
      count(pass, pass, [&](int32_t) { return threshold; });
      grid_.sync();
      judge(pass);
      clear(pass + 1);
      grid_.sync();
      if (pass == 0 && nothing_to_prune()) return;
      bin = min(a_.lowest[pass], kBins - 1);
      const bool none_fits = a_.lowest[pass] == kBins;  // in the first pass, or in none
      const bool last = none_fits || a_.members[bin] <= 1 || pass + 1 == digits_;
      extend(threshold, pass, bin, last);
      if (last) write(a_.bin_cost[bin], none_fits ? kUnreachable : 0);
    }
    select(threshold, pass - 1, bin);
  }

 private:
  static constexpr int kImageDigits = sizeof(Score);

  // Sets to 0 what is added to later. Finds the block's first family, and whether it has a NaN.
  __device__ void begin() {
    clear(0);
    if (blockIdx.x == 0) {
      if (thread_ < kMaxDigits) a_.lowest[thread_] = kBins;
      if (thread_ <= kMaxDigits) a_.open[thread_] = 0;
      const int64_t value = cost([](int32_t) { return 0; });
      if (thread_ == 0) *a_.dense = value;
    }
    if (thread_ == 0) shared_.first_family = plan_.families;
    __syncthreads();
    for (int32_t f = thread_; f < plan_.families && begin_ < end_; f += kThreads) {
      if (plan_.family_start[f] <= begin_ && begin_ < plan_.family_start[f + 1])
        shared_.first_family = f;
    }
    bool nan = false;
    for (int32_t g = begin_ + thread_; g < end_; g += kThreads) nan |= scores_[g] != scores_[g];
    nan = __syncthreads_or(nan);
    if (thread_ == 0) a_.nan[blockIdx.x] = nan;
  }

  // Where a score is NaN, or the cost is within the budget as it is: then the whole answer is written.
  __device__ bool nothing_to_prune() {
    bool nan = false;
    for (int b = thread_; b < static_cast<int>(gridDim.x); b += kThreads) nan |= a_.nan[b] != 0;
    nan = __syncthreads_or(nan);
    if (!nan && *a_.dense > *a_.budget) return false;
    for (int32_t g = begin_ + thread_; g < end_; g += kThreads) a_.mask[g] = false;
    write(*a_.dense, nan ? kNanScore : 0);
    return true;
  }

  __device__ void write(int64_t reached, int32_t status) const {
    if (blockIdx.x == 0 && thread_ == 0) {
      *a_.reached = reached;
      *a_.status = status;
    }
  }

  // --- Counting ---

  __device__ int32_t* row(int table, int32_t family) const {
    return a_.tables + (int64_t{table % kTables} * plan_.families + family) * kCounters;
  }

  __device__ void clear(int table) const {
    int32_t* const counters = row(table, 0);
    const int64_t all = int64_t{plan_.families} * kCounters;
    for (int64_t k = int64_t{blockIdx.x} * kThreads + thread_; k < all; k += gridDim.x * kThreads)
      counters[k] = 0;
  }

  // The digit that a pass finds.
  __device__ Digit digit(int pass) const {
    const bool of_image = pass < kImageDigits;
    return {of_image, kDigitBits * ((of_image ? kImageDigits : digits_) - 1 - pass)};
  }

  // The bin of a group; -1 or kBins if it lies below or above all keys that begin as the cut does.
  __device__ static int find_bin(Digit digit, const Cut& cut, uint64_t image, int32_t group) {
    if (!digit.of_image && image != cut.image) return image < cut.image ? -1 : kBins;
    const uint64_t key = (digit.of_image ? image : static_cast<uint64_t>(group)) >> digit.shift;
    const uint64_t found = (digit.of_image ? cut.image : cut.index) >> digit.shift;
    if (key >> kDigitBits == found >> kDigitBits) return static_cast<int>(key % kBins);
    return key < found ? -1 : kBins;
  }

  // Adds the block's groups to a table. A warp asks start(family) for the family's cut.
  template <class Start>
  __device__ void count(int table, int pass, const Start& start) {
    const Digit next = digit(pass);
    int32_t first = shared_.first_family;
    for (; first < plan_.families && plan_.family_start[first] < end_; first += kWindow) {
      const int families = min(kWindow, plan_.families - first);
      for (int k = thread_; k < families * kBins; k += kThreads) shared_.bins[k] = 0;
      if (warp_ < families) {
        const int32_t f = first + warp_;
        const Part part{max(begin_, plan_.family_start[f]), min(end_, plan_.family_start[f + 1]), 0,
                        start(f)};
        if (lane_ == 0) shared_.parts[warp_] = part;
      }
      __syncthreads();
      for (int k = 0; k < families; ++k) {
        if (shared_.parts[k].cut.open) count(next, shared_.parts[k], shared_.bins + k * kBins);
      }
      __syncthreads();
      for (int k = thread_; k < families * kBins; k += kThreads)
        add(row(table, first + k / kBins), k % kBins, shared_.bins[k]);
      if (thread_ < families && shared_.parts[thread_].below)
        atomicAdd(row(table, first + thread_), shared_.parts[thread_].below);
      __syncthreads();
    }
  }

  __device__ void count(Digit next, Part& part, int32_t* bins) const {
    const Cut cut = part.cut;
    int32_t below = 0;
    for (int32_t g = part.begin + thread_; g < part.end; g += kUnroll * kThreads) {
      Score scores[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (u * kThreads < part.end - g) scores[u] = scores_[g + u * kThreads];
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (u * kThreads >= part.end - g) break;
        const int bin = find_bin(next, cut, order_image(scores[u]), g + u * kThreads);
        below += bin < 0;
        if (bin >= 0 && bin < kBins) atomicAdd(bins + bin, 1);
      }
    }
    below = warp_sum(below);
    if (lane_ == 0 && below) atomicAdd(&part.below, below);
  }

  // Adds to a bin, and to the sum of its 16. A whole warp calls it, for bins one behind the other.
  __device__ static void add(int32_t* counters, int bin, int32_t count) {
    if (count) atomicAdd(counters + kCoarse + bin, count);
    for (int distance = kCoarse / 2; distance > 0; distance /= 2)
      count += __shfl_xor_sync(~0u, count, distance);
    if (bin % kCoarse == 0 && bin / kCoarse + 1 < kCoarse && count)
      atomicAdd(counters + 1 + bin / kCoarse, count);
  }

  // How many groups of a family lie in the bins up to one, or below all. In all lanes of the warp.
  __device__ int32_t up_to(const int32_t* counters, int bin) const {
    const bool wanted = lane_ < kCoarse ? lane_ <= bin / kCoarse : lane_ - kCoarse <= bin % kCoarse;
    const int counter = lane_ < kCoarse ? lane_ : bin / kCoarse * kCoarse + lane_;
    return warp_sum(wanted ? counters[counter] : 0);
  }

  // The lowest bin up to which `rank` groups of a family lie. exact: no more do. In all lanes.
  __device__ int find_rank(const int32_t* counters, int32_t rank, bool& exact) const {
    const bool low = lane_ < kCoarse;
    int32_t sum = warp_scan(low ? counters[lane_] : 0);
    const int coarse = __popc(__ballot_sync(~0u, low && sum < rank)) - 1;
    const int first = coarse * kCoarse;
    sum = __shfl_sync(~0u, sum, coarse) + warp_scan(low ? counters[kCoarse + first + lane_] : 0);
    const int fine = __popc(__ballot_sync(~0u, low && sum < rank));
    exact = __shfl_sync(~0u, sum, fine) == rank;
    return first + fine;
  }

  // Sets the digit of a pass. last: and those after it, so that all groups of the bin are included.
  __device__ void extend(Cut& cut, int pass, int bin, bool last) const {
    const Digit found = digit(pass);
    const uint64_t value = static_cast<uint64_t>(bin) << found.shift;
    const uint64_t rest = last ? (uint64_t{1} << found.shift) - 1 : 0;
    if (found.of_image) {
      cut.image |= value | rest;
      cut.index = last ? ~0u : 0;
    } else {
      cut.index |= static_cast<uint32_t>(value | rest);
    }
    cut.open = !last;
  }

  // --- The threshold ---

  // The cost where the threshold is a bin's end, for every bin: an empty one has that of the bin before.
  __device__ void judge(int table) {
    for (auto bin = static_cast<int>(blockIdx.x); bin < kBins; bin += static_cast<int>(gridDim.x)) {
      bool any = bin == kBins - 1;
      for (int32_t f = thread_; f < plan_.families; f += kThreads)
        any |= row(table, f)[kCoarse + bin] != 0;
      if (!__syncthreads_or(any)) continue;
      const int64_t value = cost([&](int32_t f) { return up_to(row(table, f), bin); });
      if (warp_ != 0) continue;
      int32_t members = 0;
      for (int32_t f = lane_; f < plan_.families; f += kWarp) members += row(table, f)[kCoarse + bin];
      members = warp_sum(members);
      if (lane_ != 0) continue;
      a_.bin_cost[bin] = value;
      a_.members[bin] = members;
      if (value <= *a_.budget) atomicMin(a_.lowest + table, bin);  // a pass's table has its number
    }
  }

  __device__ int32_t size(int32_t f) const { return plan_.family_start[f + 1] - plan_.family_start[f]; }

  __device__ int64_t to_prune(int32_t f, int64_t below) const {
    return groups_to_prune(size(f), below, a_.limits[f], a_.round_to);
  }

  // The cost where below(f) groups of family f lie at or below the threshold, in every thread. A warp
  // asks for each family.
  template <class Below>
  __device__ int64_t cost(const Below& below) {
    const CostModel& c = a_.cost;
#pragma unroll 4
    for (int32_t f = warp_; f < plan_.families; f += kWarps) {
      const int32_t count = below(f);
      if (lane_ == 0) kept_[f] = count;
    }
    __syncthreads();
    for (int32_t f = thread_; f < plan_.families; f += kThreads)
      kept_[f] = size(f) - to_prune(f, kept_[f]);
    __syncthreads();
    for (int32_t x = thread_; x < c.axes; x += kThreads) {
      int64_t kept = c.axis_fixed[x];
      for (int64_t e = c.axis_start[x]; e < c.axis_start[x + 1]; ++e)
        kept += c.entry_count[e] * kept_[c.entry_family[e]];
      axis_[x] = kept;
    }
    __syncthreads();
    int64_t mine = 0;
    for (int32_t k = thread_; k < c.terms; k += kThreads)
      mine += c.term_coefficient[k] * axis_[c.term_rows[k]] * axis_[c.term_cols[k]];
    mine = warp_sum(mine);
    if (lane_ == 0) shared_.sums[warp_] = mine;
    __syncthreads();
    int64_t sum = 0;
    for (int k = 0; k < kWarps; ++k) sum += shared_.sums[k];
    return sum;
  }

  // --- The groups of each family ---

  // Writes the mask: the lowest groups of each family, as many as the threshold, its limit and rounding
  // allow. The threshold lies in `bin` of `table`.
  __device__ void select(const Cut& threshold, int table, int bin) {
    int pass = 0;
    for (;; ++pass) {
      const int before = table + pass;
      count(before + 1, pass, [&](int32_t f) {
        const Cut cut =
            pass == 0 ? start(threshold, f, row(before, f), bin) : go_on(f, row(before, f), pass - 1);
        // The block that has the family's first group writes for all.
        if (lane_ == 0 && plan_.family_start[f] >= begin_) {
          cut_of(pass, f) = cut;
          if (cut.open) atomicAdd(a_.open + pass, 1);
        }
        return cut;
      });
      clear(before + 2);
      grid_.sync();
      if (a_.open[pass] == 0) break;
    }
    int32_t f = shared_.first_family;
    for (; f < plan_.families && plan_.family_start[f] < end_; ++f) {
      const Cut cut = cut_of(pass, f);
      const int32_t end = min(end_, plan_.family_start[f + 1]);
      for (int32_t g = max(begin_, plan_.family_start[f]) + thread_; g < end; g += kThreads) {
        const uint64_t image = order_image(scores_[g]);
        a_.mask[g] = cut.rank > 0 && (image < cut.image ||
                                      (image == cut.image && static_cast<uint32_t>(g) <= cut.index));
      }
    }
  }

  __device__ Cut& cut_of(int pass, int32_t family) const {
    return a_.cuts[int64_t{pass % 2} * plan_.families + family];
  }

  // A family's search begins. There is none where all up to the threshold are pruned, or none are.
  __device__ Cut start(const Cut& threshold, int32_t family, const int32_t* counters, int bin) const {
    const int32_t below = up_to(counters, bin);
    const auto rank = static_cast<int32_t>(to_prune(family, below));
    if (rank > 0 && rank < below) return {0, 0, rank, true};
    return {threshold.image, threshold.index, rank, false};
  }

  // A family's search with the digit of a pass found.
  __device__ Cut go_on(int32_t family, const int32_t* counters, int pass) const {
    Cut cut = cut_of(pass, family);
    if (!cut.open) return cut;
    bool exact;
    const int bin = find_rank(counters, cut.rank, exact);
    extend(cut, pass, bin, exact);
    return cut;
  }

  const KernelArguments& a_;
  const Plan& plan_;
  Shared& shared_;
  const Score* scores_;
  const cooperative_groups::grid_group grid_ = cooperative_groups::this_grid();
  const int thread_, warp_, lane_;
  int32_t begin_, end_;        // the block's groups
  int64_t *kept_, *axis_;      // [families], [axes]
  int digits_ = kImageDigits;  // of a key
};

template <class Score>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    partition_kernel(const __grid_constant__ KernelArguments arguments) {
  __shared__ Shared shared;
  Search<Score>(arguments, shared).run();
}

std::tuple<Tensor, Tensor, Tensor> partition(const Tensor& scores, const Tensor& tables,
                                             const std::vector<int64_t>& layout,
                                             const Tensor& cost_tables,
                                             const std::vector<int64_t>& cost_layout,
                                             const Tensor& limits, int64_t round_to,
                                             const Tensor& budget) {
  constexpr const char* kOp = "partition";
  KernelArguments a{};
  const auto [plan, cost] =
      check_partition(kOp, scores, tables, layout, cost_tables, cost_layout, limits, round_to, budget);
  a.plan = plan;
  a.cost = cost;
  const OnDevice here(kOp, tables);
  const auto empty = [&](std::initializer_list<int64_t> size, ScalarType dtype) {
    return torch::stable::new_empty(tables, size, dtype);
  };
  const bool in_double = scores.scalar_type() == ScalarType::Double;
  const auto kernel = in_double ? partition_kernel<double> : partition_kernel<float>;
  const int blocks = std::min(kMaxBlocks, resident_blocks(kOp, kernel, kThreads));
  const int64_t families = plan.families, counts = families + cost.axes;
  constexpr int64_t kCutWords = sizeof(Cut) / sizeof(int64_t);
  Tensor mask = empty({plan.groups}, ScalarType::Bool);
  Tensor reached = empty({}, ScalarType::Long);
  Tensor status = empty({}, ScalarType::Int);
  const int64_t spilled = counts > kMaxShared ? blocks * counts : 0;
  const Tensor scratch64 = empty({kBins + 1 + 2 * families * kCutWords + spilled}, ScalarType::Long);
  const Tensor scratch32 =
      empty({kTables * families * kCounters + kBins + 2 * kMaxDigits + 1 + blocks}, ScalarType::Int);
  a.scores = scores.const_data_ptr();
  a.limits = limits.const_data_ptr<int64_t>();
  a.budget = budget.const_data_ptr<int64_t>();
  a.round_to = round_to;
  a.mask = mask.mutable_data_ptr<bool>();
  a.reached = reached.mutable_data_ptr<int64_t>();
  a.status = status.mutable_data_ptr<int32_t>();
  a.bin_cost = scratch64.mutable_data_ptr<int64_t>();
  a.dense = a.bin_cost + kBins;
  a.cuts = reinterpret_cast<Cut*>(a.dense + 1);
  a.counts = spilled ? a.dense + 1 + 2 * families * kCutWords : nullptr;
  a.tables = scratch32.mutable_data_ptr<int32_t>();
  a.members = a.tables + kTables * families * kCounters;
  a.lowest = a.members + kBins;
  a.open = a.lowest + kMaxDigits;
  a.nan = a.open + kMaxDigits + 1;
  launch(kOp, kernel, blocks, kThreads, true, here.stream(), a);
  return {mask, reached, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("partition", TORCH_BOX(&partition));
}

}  // namespace ocsfast::cuda
