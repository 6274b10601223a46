// The partition in one launch of one block. It bisects over the bits of the score's image (order.h),
// then, where scores are equal, over the bits of the index. Every pass counts each family's groups below
// a threshold.
//
// One block of 1024 threads, the most there are, because every pass depends on the one before it: 26 000
// scores (ResNet50) stay in L2, and a pass over them costs less than a barrier of the whole grid and
// adding its blocks' counters up. Argued, not timed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../order.h"
#include "runtime.h"

namespace ocsfast::cuda {
namespace {

constexpr int kThreads = 1024;

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
  int32_t* family;  // [groups] each group's family
  int32_t* count;   // [families]
  int32_t* pruned;  // [families] how many groups to prune
  int32_t* rank;    // [families] which group, counted from 1, `select` looks for among those that agree
                    // with `image` so far
  int64_t* axis;    // [axes] indices kept
  uint64_t* image;  // [families] image of the last score to prune
  int32_t* last;    // [families] among equal scores, the last index to prune
};

// A group is pruned, if its family's limit allows it, where its score and index are at most these.
struct Threshold {
  uint64_t image;
  int32_t index;
};

template <class Score>
class Search {
 public:
  __device__ explicit Search(const KernelArguments& a)
      : a_(a), scores_(static_cast<const Score*>(a.scores)) {}

  __device__ void run() {
    set_families();
    if (any_nan()) {
      const int64_t value = cost_of_none();
      write(value, kNanScore);
      return;
    }
    int32_t status = 0;
    if (cost_of_none() > *a_.budget) {
      Threshold t{~uint64_t{0} >> (64 - kImageBits), INT32_MAX};
      if (cost_at(t) > *a_.budget) {
        status = kUnreachable;
      } else {
        // The smallest threshold within the budget: from the top, clear each bit that can be cleared.
        for (int bit = kImageBits - 1; bit >= 0; --bit) {
          const Threshold lower{t.image & ~(uint64_t{1} << bit), INT32_MAX};
          if (cost_at(lower) <= *a_.budget) t.image = lower.image;
        }
        // The smallest index, if several groups have that score.
        if (total_with(t.image) > 1) {
          t.index = static_cast<int32_t>((int64_t{1} << index_bits()) - 1);
          for (int bit = index_bits() - 1; bit >= 0; --bit) {
            const Threshold lower{t.image, t.index & ~(1 << bit)};
            if (cost_at(lower) <= *a_.budget) t.index = lower.index;
          }
        }
      }
      const int64_t value = cost_at(t);
      select();
      write(value, status);
    } else {
      write(cost_of_none(), 0);
    }
  }

 private:
  static constexpr int kImageBits = 8 * sizeof(Score);

  // count[f] = how many groups of family f satisfy below(group, image, family).
  template <class Below>
  __device__ void count(const Below& below) {
    for (int32_t f = threadIdx.x; f < a_.plan.families; f += kThreads) a_.count[f] = 0;
    __syncthreads();
    for (int32_t g = threadIdx.x; g < a_.plan.groups; g += kThreads) {
      const int32_t f = a_.family[g];
      if (f >= 0 && below(g, order_image(scores_[g]), f))
        atomicAdd(&a_.count[f], 1);  // of integers: any order gives the same
    }
    __syncthreads();
  }

  // How many groups have this score.
  __device__ int64_t total_with(uint64_t image) {
    int64_t mine = 0;
    for (int32_t g = threadIdx.x; g < a_.plan.groups; g += kThreads)
      mine += order_image(scores_[g]) == image;
    return sum(mine);
  }

  // The sum over all threads, in every thread.
  __device__ int64_t sum(int64_t mine) {
    __shared__ unsigned long long total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    atomicAdd(&total, static_cast<unsigned long long>(mine));
    __syncthreads();
    const int64_t value = static_cast<int64_t>(total);
    __syncthreads();
    return value;
  }

  // Bits of a group's index.
  __device__ int index_bits() const {
    int bits = 0;
    while (int64_t{1} << bits < a_.plan.groups) ++bits;
    return bits;
  }

  __device__ void set_families() {
    for (int32_t g = threadIdx.x; g < a_.plan.groups; g += kThreads) {
      int32_t low = 0, high = a_.plan.families - 1;
      while (low < high) {
        const int32_t middle = (low + high + 1) / 2;
        if (a_.plan.family_start[middle] <= g) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      a_.family[g] = a_.plan.families ? low : -1;
      a_.mask[g] = false;
    }
    __syncthreads();
  }

  __device__ bool any_nan() {
    bool nan = false;
    for (int32_t g = threadIdx.x; g < a_.plan.groups; g += kThreads) nan |= scores_[g] != scores_[g];
    return __syncthreads_or(nan);
  }

  __device__ int64_t cost_of_none() {
    for (int32_t f = threadIdx.x; f < a_.plan.families; f += kThreads) a_.pruned[f] = 0;
    __syncthreads();
    return cost();
  }

  // Sets pruned[].
  __device__ int64_t cost_at(const Threshold& t) {
    count([&](int32_t g, uint64_t image, int32_t) {
      return image < t.image || (image == t.image && g <= t.index);
    });
    for (int32_t f = threadIdx.x; f < a_.plan.families; f += kThreads) {
      a_.pruned[f] =
          static_cast<int32_t>(groups_to_prune(size(f), a_.count[f], a_.limits[f], a_.round_to));
    }
    __syncthreads();
    return cost();
  }

  __device__ int32_t size(int32_t f) const {
    return a_.plan.family_start[f + 1] - a_.plan.family_start[f];
  }

  // The cost where pruned[f] groups of each family are pruned, in every thread.
  __device__ int64_t cost() {
    const CostModel& c = a_.cost;
    for (int32_t x = threadIdx.x; x < c.axes; x += kThreads) {
      int64_t kept = c.axis_fixed[x];
      for (int64_t e = c.axis_start[x]; e < c.axis_start[x + 1]; ++e) {
        const int32_t f = static_cast<int32_t>(c.entry_family[e]);
        kept += c.entry_count[e] * (size(f) - a_.pruned[f]);
      }
      a_.axis[x] = kept;
    }
    __syncthreads();
    int64_t mine = 0;
    for (int32_t k = threadIdx.x; k < c.terms; k += kThreads)
      mine += c.term_coefficient[k] * a_.axis[c.term_rows[k]] * a_.axis[c.term_cols[k]];
    return sum(mine);
  }

  // Marks the pruned[f] lowest groups of each family, all families at once: sets image[f] to the image
  // of the last of them, and last[f] to its index.
  __device__ void select() {
    for (int32_t f = threadIdx.x; f < a_.plan.families; f += kThreads) {
      a_.image[f] = 0;
      a_.last[f] = 0;
      a_.rank[f] = a_.pruned[f];
    }
    __syncthreads();
    for (int bit = kImageBits - 1; bit >= 0; --bit) {
      // Counts the groups that agree with image[f] above this bit and have a 0 in it.
      count([&](int32_t, uint64_t image, int32_t f) { return image >> bit == a_.image[f] >> bit; });
      descend(a_.image, uint64_t{1} << bit);
    }
    // Of equal scores the lowest indices. In most families all of them are pruned or none.
    count([&](int32_t, uint64_t image, int32_t f) { return image == a_.image[f]; });
    bool some = false;
    for (int32_t f = threadIdx.x; f < a_.plan.families; f += kThreads) some |= a_.rank[f] < a_.count[f];
    some = __syncthreads_or(some);
    for (int32_t f = threadIdx.x; !some && f < a_.plan.families; f += kThreads) a_.last[f] = INT32_MAX;
    __syncthreads();
    for (int bit = index_bits() - 1; some && bit >= 0; --bit) {
      count([&](int32_t g, uint64_t image, int32_t f) {
        return image == a_.image[f] && g >> bit == a_.last[f] >> bit;
      });
      descend(a_.last, 1 << bit);
    }
    for (int32_t g = threadIdx.x; g < a_.plan.groups; g += kThreads) {
      const int32_t f = a_.family[g];
      if (f < 0) continue;
      const uint64_t image = order_image(scores_[g]);
      a_.mask[g] =
          a_.pruned[f] > 0 && (image < a_.image[f] || (image == a_.image[f] && g <= a_.last[f]));
    }
  }

  // The group looked for is number rank[f]: if fewer lie in the lower half, it lies in the upper.
  template <class Prefix>
  __device__ void descend(Prefix* prefix, Prefix half) {
    for (int32_t f = threadIdx.x; f < a_.plan.families; f += kThreads) {
      if (a_.rank[f] > a_.count[f]) {
        a_.rank[f] -= a_.count[f];
        prefix[f] |= half;
      }
    }
    __syncthreads();
  }

  __device__ void write(int64_t reached, int32_t status) {
    if (threadIdx.x == 0) {
      *a_.reached = reached;
      *a_.status = status;
    }
  }

  const KernelArguments& a_;
  const Score* scores_;
};

template <class Score>
__global__ void __launch_bounds__(kThreads)
    partition_kernel(const __grid_constant__ KernelArguments arguments) {
  Search<Score>(arguments).run();
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
  const int64_t groups = a.plan.groups, families = a.plan.families;
  Tensor mask = empty({groups}, ScalarType::Bool);
  Tensor reached = empty({}, ScalarType::Long);
  Tensor status = empty({}, ScalarType::Int);
  const Tensor scratch64 = empty({families + a.cost.axes}, ScalarType::Long);
  const Tensor scratch32 = empty({groups + 4 * families}, ScalarType::Int);
  a.scores = scores.const_data_ptr();
  a.limits = limits.const_data_ptr<int64_t>();
  a.budget = budget.const_data_ptr<int64_t>();
  a.round_to = round_to;
  a.mask = mask.mutable_data_ptr<bool>();
  a.reached = reached.mutable_data_ptr<int64_t>();
  a.status = status.mutable_data_ptr<int32_t>();
  a.image = static_cast<uint64_t*>(scratch64.mutable_data_ptr());
  a.axis = scratch64.mutable_data_ptr<int64_t>() + families;
  a.family = scratch32.mutable_data_ptr<int32_t>();
  a.count = a.family + groups;
  a.pruned = a.count + families;
  a.rank = a.pruned + families;
  a.last = a.rank + families;
  const bool in_double = scores.scalar_type() == ScalarType::Double;
  launch(kOp, in_double ? partition_kernel<double> : partition_kernel<float>, 1, kThreads, false,
         here.stream(), a);
  return {mask, reached, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("partition", TORCH_BOX(&partition));
}

}  // namespace ocsfast::cuda
