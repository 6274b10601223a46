// The partition in one cooperative launch: a radix search, the highest digit first, for the lowest
// threshold within the budget, and then one in each family for the last of its groups to go.
//
// A pass finds the next 8 bits of a threshold. All blocks count their groups by these (counter.cuh).
// Then each block computes what the cost is if the threshold is the end of a bin. A barrier of the grid
// follows either. A search ends where its bin holds one group: of ResNet50's 11 456 scores after 3
// passes. Only where scores are equal it goes on over the bits of the index.
#include <cooperative_groups.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../cost.h"
#include "counter.cuh"
#include "runtime.h"

namespace ocsfast::cuda {
namespace {

constexpr int kBlocksPerSm = 2;
// One block for each bin that may be the threshold's. More would make the barriers longer.
constexpr int kMaxBlocks = kBins;
// Families and axes whose counts a block keeps in shared memory. Of more it keeps them in scratch
// memory.
constexpr int64_t kMaxShared = 2048;

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

struct Shared {
  CounterShared counter;
  int64_t sums[kWarps];
  int64_t counts[kMaxShared];
};

template <class Score>
class Search {
 public:
  __device__ Search(const KernelArguments& a, Shared& shared)
      : a_(a),
        shared_(shared),
        counter_(a.plan, a.scores, a.tables, shared.counter),
        plan_(counter_.plan),
        scores_(counter_.scores),
        thread_(counter_.thread),
        warp_(counter_.warp),
        lane_(counter_.lane),
        begin_(counter_.begin),
        end_(counter_.end) {
    const int64_t counts = int64_t{plan_.families} + a.cost.axes;
    kept_ = a.counts ? a.counts + blockIdx.x * counts : shared.counts;
    axis_ = kept_ + plan_.families;
  }

  __device__ void run() {
    begin();
    grid_.sync();
    Cut threshold{0, 0, 0, true};
    int pass = 0, bin = 0;
    for (; threshold.open; ++pass) {
      counter_.count(pass, pass, [&](int32_t) { return threshold; });
      grid_.sync();
      judge(pass);
      counter_.clear(pass + 1);
      grid_.sync();
      if (pass == 0 && nothing_to_prune()) return;
      bin = min(a_.lowest[pass], kBins - 1);
      const bool none_fits = a_.lowest[pass] == kBins;  // in the first pass, or in none
      const bool last = none_fits || a_.members[bin] <= 1 || pass + 1 == counter_.digits;
      counter_.extend(threshold, pass, bin, last);
      if (last) write(a_.bin_cost[bin], none_fits ? kUnreachable : 0);
    }
    select(threshold, pass - 1, bin);
  }

 private:
  // Sets to 0 what is added to later. Finds the block's first family, and whether it has a NaN.
  __device__ void begin() {
    counter_.clear(0);
    if (blockIdx.x == 0) {
      if (thread_ < kMaxDigits) a_.lowest[thread_] = kBins;
      if (thread_ <= kMaxDigits) a_.open[thread_] = 0;
      const int64_t value = cost([](int32_t) { return 0; });
      if (thread_ == 0) *a_.dense = value;
    }
    if (thread_ == 0) shared_.counter.first_family = plan_.families;
    __syncthreads();
    for (int32_t f = thread_; f < plan_.families && begin_ < end_; f += kThreads) {
      if (plan_.family_start[f] <= begin_ && begin_ < plan_.family_start[f + 1])
        shared_.counter.first_family = f;
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

  // --- The threshold ---

  // The cost where the threshold is a bin's end, for every bin: an empty one has that of the bin before.
  __device__ void judge(int table) {
    for (auto bin = static_cast<int>(blockIdx.x); bin < kBins; bin += static_cast<int>(gridDim.x)) {
      bool any = bin == kBins - 1;
      for (int32_t f = thread_; f < plan_.families; f += kThreads)
        any |= counter_.row(table, f)[kCoarse + bin] != 0;
      if (!__syncthreads_or(any)) continue;
      const int64_t value = cost([&](int32_t f) { return counter_.up_to(counter_.row(table, f), bin); });
      if (warp_ != 0) continue;
      int32_t members = 0;
      for (int32_t f = lane_; f < plan_.families; f += kWarp)
        members += counter_.row(table, f)[kCoarse + bin];
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
    for (int32_t x = thread_; x < c.axes; x += kThreads) axis_[x] = axis_size(c, x, kept_);
    __syncthreads();
    int64_t mine = 0;
    for (int32_t k = thread_; k < c.terms; k += kThreads) mine += term_cost(c, k, axis_);
    for (int32_t k = thread_; k < c.lookups; k += kThreads) mine += lookup_cost(c, k, axis_);
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
      counter_.count(before + 1, pass, [&](int32_t f) {
        const Cut cut = pass == 0 ? start(threshold, f, counter_.row(before, f), bin)
                                  : go_on(f, counter_.row(before, f), pass - 1);
        // The block that has the family's first group writes for all.
        if (lane_ == 0 && plan_.family_start[f] >= begin_) {
          cut_of(pass, f) = cut;
          if (cut.open) atomicAdd(a_.open + pass, 1);
        }
        return cut;
      });
      counter_.clear(before + 2);
      grid_.sync();
      if (a_.open[pass] == 0) break;
    }
    int32_t f = shared_.counter.first_family;
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
    const int32_t below = counter_.up_to(counters, bin);
    const auto rank = static_cast<int32_t>(to_prune(family, below));
    if (rank > 0 && rank < below) return {0, 0, rank, true};
    return {threshold.image, threshold.index, rank, false};
  }

  // A family's search with the digit of a pass found.
  __device__ Cut go_on(int32_t family, const int32_t* counters, int pass) const {
    Cut cut = cut_of(pass, family);
    if (!cut.open) return cut;
    bool exact;
    const int bin = counter_.find_rank(counters, cut.rank, exact);
    counter_.extend(cut, pass, bin, exact);
    return cut;
  }

  const KernelArguments& a_;
  Shared& shared_;
  Counter<Score> counter_;
  const Plan& plan_;
  const Score* scores_;
  const cooperative_groups::grid_group grid_ = cooperative_groups::this_grid();
  const int thread_, warp_, lane_;
  const int32_t begin_, end_;  // the block's groups
  int64_t *kept_, *axis_;      // [families], [axes]
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
