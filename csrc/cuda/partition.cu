// The partition in one cooperative launch: a radix search, the highest digit first, for the lowest
// threshold within the budget; the same again among the families that can still give groups back; and
// then one in each family for the last of its groups to go.
//
// A pass finds the next 8 bits of a threshold. All blocks count their groups by these (counter.cuh).
// Then each block computes what the cost is if the threshold is the end of a bin. A barrier of the grid
// follows either. A search ends where its bin holds one group: of ResNet50's 11 456 scores after 3
// passes. Only where scores are equal it goes on over the bits of the index.
//
// Then the blocks share out the families: which of them would miss the budget if it lost a unit less?
// Those are held, all at once. What is left to spend is less than any of them takes, so that a few
// searches do, not one for each family.
#include <cooperative_groups.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kept.cuh"
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
  PartitionArguments in;
  bool* mask;        // [groups] out
  int64_t* reached;  // out: the cost
  int32_t* status;   // out
  // Scratch.
  int64_t* counts;    // [blocks][families + axes] each block's; null: in shared memory
  int64_t* bin_cost;  // [kBins] the cost where the threshold is a bin's end
  int64_t* dense;     // [1] the cost where no group is pruned
  int64_t* returned;  // [1] the cost where the open families lose nothing
  Cut* cuts;  // [2][families] how many groups of each go, and which: rank is kOpen while it is open
  int32_t* tables;   // [kTables][families][kCounters]
  int32_t* members;  // [kBins] groups in a bin
  int32_t* lowest;   // [kTables] by table: the lowest bin whose end is within the budget
  int32_t* open;     // [kTables] by table: families that are open still, or whose search goes on
  int32_t* nan;      // [blocks] whether a block has seen a NaN
};
constexpr int32_t kOpen = -1;

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
        counter_(a.in.plan, a.in.scores, a.tables, shared.counter),
        plan_(counter_.plan),
        scores_(counter_.scores),
        thread_(counter_.thread),
        warp_(counter_.warp),
        lane_(counter_.lane),
        begin_(counter_.begin),
        end_(counter_.end),
        kept_{a.in, find_counts(), shared.sums} {}

  __device__ void run() {
    begin();
    grid_.sync();
    int table = 0;
    for (;; ++table) {
      Cut threshold{0, 0, 0, true};
      int bin = 0;
      bool fits = true;
      for (int pass = 0;; ++pass, ++table) {
        counter_.count(table, pass, [&](int32_t f) {
          Cut cut = threshold;
          cut.open = is_open(f);
          return cut;
        });
        grid_.sync();
        judge(table);
        clear(table + 1);
        grid_.sync();
        if (table == 0 && nothing_to_prune()) return;
        fits = a_.lowest[table % kTables] < kBins;  // but for the first pass of all, it does
        bin = fits ? a_.lowest[table % kTables] : kBins - 1;
        const bool last = !fits || a_.members[bin] <= 1 || pass + 1 == counter_.digits;
        counter_.extend(threshold, pass, bin, last);
        if (last) break;
      }
      const bool give_back = fits && a_.in.give_back;
      hold(table, bin, threshold, give_back);
      grid_.sync();
      ++version_;
      const bool all_held = a_.open[table % kTables] == 0;
      if (!all_held && *a_.returned > budget()) continue;
      write(all_held ? a_.bin_cost[bin] : *a_.returned, fits ? 0 : kUnreachable);
      break;
    }
    select(table);
  }

 private:
  // The block's [families + axes].
  __device__ int64_t* find_counts() const {
    const int64_t counts = int64_t{plan_.families} + a_.in.cost.axes;
    return a_.counts ? a_.counts + blockIdx.x * counts : shared_.counts;
  }

  // Sets to 0 what is added to later. Finds the block's first family, and whether it has a NaN.
  __device__ void begin() {
    clear(0);
    if (blockIdx.x == 0) {
      for (int32_t f = thread_; f < plan_.families; f += kThreads) kept_[f] = kept_.size(f);
      __syncthreads();
      const int64_t value = kept_.cost();
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

  __device__ void clear(int table) const {
    counter_.clear(table);
    if (blockIdx.x == 0 && thread_ == 0) {
      a_.lowest[table % kTables] = kBins;
      a_.open[table % kTables] = 0;
    }
  }

  // Where a score is NaN, or the cost is within the budget as it is: then the whole answer is written.
  __device__ bool nothing_to_prune() {
    bool nan = false;
    for (int b = thread_; b < static_cast<int>(gridDim.x); b += kThreads) nan |= a_.nan[b] != 0;
    nan = __syncthreads_or(nan);
    if (!nan && *a_.dense > budget()) return false;
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

  __device__ int64_t budget() const { return *a_.in.budget; }
  // The cut of a family: it is read in one version while the next is written.
  __device__ Cut& cut_of(int version, int32_t family) const {
    return a_.cuts[int64_t{version % 2} * plan_.families + family];
  }

  __device__ bool is_open(int32_t f) const { return version_ == 0 || cut_of(version_, f).rank == kOpen; }

  // --- The threshold ---

  // The cost where the threshold is a bin's end, for every bin: an empty one has that of the bin before.
  __device__ void judge(int table) {
    for (auto bin = static_cast<int>(blockIdx.x); bin < kBins; bin += static_cast<int>(gridDim.x)) {
      bool any = bin == kBins - 1;
      for (int32_t f = thread_; f < plan_.families; f += kThreads)
        any |= counter_.row(table, f)[kCoarse + bin] != 0;
      if (!__syncthreads_or(any)) continue;
      find_kept(table, bin);
      const int64_t value = kept_.cost();
      if (warp_ != 0) continue;
      int32_t members = 0;
      for (int32_t f = lane_; f < plan_.families; f += kWarp)
        members += counter_.row(table, f)[kCoarse + bin];
      members = warp_sum(members);
      if (lane_ != 0) continue;
      a_.bin_cost[bin] = value;
      a_.members[bin] = members;
      if (value <= budget()) atomicMin(a_.lowest + table % kTables, bin);
    }
  }

  // What each family keeps where the threshold is a bin's end, in kept_.
  __device__ void find_kept(int table, int bin) {
#pragma unroll 4
    for (int32_t f = warp_; f < plan_.families; f += kWarps) {
      const int32_t below = counter_.up_to(counter_.row(table, f), bin);
      if (lane_ == 0) kept_[f] = below;
    }
    __syncthreads();
    kept_.share_largest();
    for (int32_t f = thread_; f < plan_.families; f += kThreads)
      kept_[f] = kept_.size(f) - (is_open(f) ? kept_.to_prune(f, kept_[f]) : cut_of(version_, f).rank);
    __syncthreads();
  }

  // --- What is given back ---

  // Holds every open family that cannot lose one unit less at this threshold, which lies in `bin` of
  // `table`: it would be held as soon as the threshold fell to its next group, as the cost only rises
  // until then. Where nothing is given back, all are held. And computes the cost where the open families
  // lose nothing: below that there is no group to search for.
  __device__ void hold(int table, int bin, const Cut& threshold, bool give_back) {
    const int32_t families = plan_.families;
    for (auto f = static_cast<int32_t>(blockIdx.x); f <= families;
         f += static_cast<int32_t>(gridDim.x)) {
      const bool all = f == families;
      if (all ? !give_back : kept_.tied(f) != f) continue;
      int32_t gone = 0;
      bool held = false;
      if (all || is_open(f)) {
        find_kept(table, bin);
        if (!all) gone = static_cast<int32_t>(kept_.size(f) - kept_[f]);
        __syncthreads();
        held = !all && (gone == 0 || !give_back);
        if (!held) {
          for (int32_t other = thread_; other < families; other += kThreads) {
            if (all ? is_open(other) : kept_.tied(other) == f)
              kept_[other] = kept_.size(other) - (all ? 0 : kept_.to_prune(other, gone - 1));
          }
          __syncthreads();
          const int64_t value = kept_.cost();
          held = value > budget();
          if (thread_ == 0 && all) *a_.returned = value;
          if (thread_ == 0 && !all && !held) atomicAdd(a_.open + table % kTables, 1);
        }
      }
      if (!all) set_cuts(f, held, gone, table, bin, threshold);
    }
  }

  // The next cuts of a family, and of those that are tied to it.
  __device__ void set_cuts(int32_t first, bool held, int32_t gone, int table, int bin,
                           const Cut& threshold) {
    const bool was_open = is_open(first);
    for (int32_t f = first + warp_; f < plan_.families; f += kWarps) {
      if (kept_.tied(f) != first) continue;
      Cut cut{0, 0, kOpen, true};
      if (!was_open) {
        cut = cut_of(version_, f);
      } else if (held) {
        // Where all of its groups up to the threshold go, that is its last one.
        const bool all = gone == counter_.up_to(counter_.row(table, f), bin);
        cut = {all ? threshold.image : 0, all ? threshold.index : 0, gone, gone > 0 && !all};
      }
      if (lane_ == 0) cut_of(version_ + 1, f) = cut;
    }
  }

  // --- The groups of each family ---

  // Writes the mask: the lowest groups of each family, as many as `cuts` says. Tables up to `table` are
  // used.
  __device__ void select(int table) {
    for (int pass = 0;; ++pass) {
      counter_.count(table + 1, pass, [&](int32_t f) {
        const Cut cut = pass == 0 ? start(f) : go_on(f, counter_.row(table, f), pass - 1);
        // The block that has the family's first group writes for all.
        if (lane_ == 0 && plan_.family_start[f] >= begin_) {
          cut_of(version_ + 1, f) = cut;
          if (cut.open) atomicAdd(a_.open + (table + 1) % kTables, 1);
        }
        return cut;
      });
      ++table;
      clear(table + 1);
      grid_.sync();
      ++version_;
      if (a_.open[table % kTables] == 0) break;
    }
    int32_t f = shared_.counter.first_family;
    for (; f < plan_.families && plan_.family_start[f] < end_; ++f) {
      const Cut cut = cut_of(version_, f);
      const int32_t end = min(end_, plan_.family_start[f + 1]);
      for (int32_t g = max(begin_, plan_.family_start[f]) + thread_; g < end; g += kThreads) {
        const uint64_t image = order_image(scores_[g]);
        a_.mask[g] = cut.rank > 0 && (image < cut.image ||
                                      (image == cut.image && static_cast<uint32_t>(g) <= cut.index));
      }
    }
  }

  // A family's search begins; one that is open yet loses nothing.
  __device__ Cut start(int32_t family) const {
    const Cut cut = cut_of(version_, family);
    return cut.rank == kOpen ? Cut{} : cut;
  }

  // A family's search with the digit of a pass found.
  __device__ Cut go_on(int32_t family, const int32_t* counters, int pass) const {
    Cut cut = cut_of(version_, family);
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
  const Kept kept_;
  int version_ = 0;  // of `cuts`; at first all families are open, and none is written
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
                                             const Tensor& limits, const Tensor& budget,
                                             const std::optional<Tensor>& units,
                                             const std::optional<Tensor>& ties, bool give_back) {
  constexpr const char* kOp = "partition";
  KernelArguments a{};
  a.in = check_partition(kOp, scores, tables, layout, cost_tables, cost_layout, limits, budget, units,
                         ties, give_back);
  const OnDevice here(kOp, tables);
  const auto empty = [&](std::initializer_list<int64_t> size, ScalarType dtype) {
    return torch::stable::new_empty(tables, size, dtype);
  };
  const auto kernel = a.in.in_double ? partition_kernel<double> : partition_kernel<float>;
  const int blocks = std::min(kMaxBlocks, resident_blocks(kOp, kernel, kThreads));
  const int64_t families = a.in.plan.families, counts = families + a.in.cost.axes;
  constexpr int64_t kCutWords = sizeof(Cut) / sizeof(int64_t);
  Tensor mask = empty({a.in.plan.groups}, ScalarType::Bool);
  Tensor reached = empty({}, ScalarType::Long);
  Tensor status = empty({}, ScalarType::Int);
  const int64_t spilled = counts > kMaxShared ? blocks * counts : 0;
  const Tensor scratch64 = empty({kBins + 2 + 2 * families * kCutWords + spilled}, ScalarType::Long);
  const Tensor scratch32 =
      empty({kTables * families * kCounters + kBins + 2 * kTables + blocks}, ScalarType::Int);
  a.mask = mask.mutable_data_ptr<bool>();
  a.reached = reached.mutable_data_ptr<int64_t>();
  a.status = status.mutable_data_ptr<int32_t>();
  a.bin_cost = scratch64.mutable_data_ptr<int64_t>();
  a.dense = a.bin_cost + kBins;
  a.returned = a.dense + 1;
  a.cuts = reinterpret_cast<Cut*>(a.returned + 1);
  a.counts = spilled ? a.returned + 1 + 2 * families * kCutWords : nullptr;
  a.tables = scratch32.mutable_data_ptr<int32_t>();
  a.members = a.tables + kTables * families * kCounters;
  a.lowest = a.members + kBins;
  a.open = a.lowest + kTables;
  a.nan = a.open + kTables;
  launch(kOp, kernel, blocks, kThreads, true, here.stream(), a);
  return {mask, reached, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("partition", TORCH_BOX(&partition));
}

}  // namespace ocsfast::cuda
