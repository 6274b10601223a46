// The partition in one launch of one block: bisection over the bits of the score's image, then, where
// scores are equal, over the bits of the index. Every pass counts the groups below a threshold, a family
// a counter.
//
// One block, because every pass depends on the one before: 26 000 scores stay in L2, and a pass over
// them costs less than a barrier of the whole grid and the counters' merge.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../order.h"
#include "runtime.h"

namespace ocsfast::cuda {
namespace {

constexpr int kThreads = 1024;

struct Arguments {
  Plan plan;
  CostModel cost;
  const void* scores;     // [groups] float or double
  const int64_t* limits;  // [families]
  const int64_t* budget;
  int64_t round_to;
  bool* mask;        // [groups] out
  int64_t* reached;  // out
  int32_t* status;   // out
  int32_t* family;   // [groups] scratch: each group's family
  int32_t* count;    // [families] scratch
  int32_t* gone;     // [families] scratch: groups to prune
  int32_t* left;     // [families] scratch: of these, still to be found above `image`
  int64_t* axis;     // [axes] scratch
  uint64_t* image;   // [families] scratch: image of the last score that goes
  int32_t* last;     // [families] scratch: among equal scores, the last index that goes
};

// A place in the order of groups: everything up to it goes.
struct Threshold {
  uint64_t image;
  int32_t index;
};

template <class Score>
class Search {
 public:
  __device__ explicit Search(const Arguments& a) : a_(a), scores_(static_cast<const Score*>(a.scores)) {}

  __device__ void run() {
    set_families();
    if (any_nan()) {
      const int64_t value = cost_without();
      write(value, kNanScore);
      return;
    }
    int32_t status = 0;
    if (cost_without() > *a_.budget) {
      Threshold t{~uint64_t{0} >> (64 - kImageBits), INT32_MAX};
      if (cost_at(t) > *a_.budget) {
        status = kUnreachable;
      } else {
        // The smallest threshold within the budget, bit by bit from the top: clear each bit that may be.
        for (int bit = kImageBits - 1; bit >= 0; --bit) {
          const Threshold lower{t.image & ~(uint64_t{1} << bit), INT32_MAX};
          if (cost_at(lower) <= *a_.budget) t.image = lower.image;
        }
        // Then the smallest index, where that score is not the only one.
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
      write(cost_without(), 0);
    }
  }

 private:
  static constexpr int kImageBits = 8 * sizeof(Score);

  // count[f] = groups of family f for which below(group, image, family) holds.
  template <class Below>
  __device__ void count(const Below& below) {
    for (int32_t f = threadIdx.x; f < a_.plan.families; f += kThreads) a_.count[f] = 0;
    __syncthreads();
    for (int32_t g = threadIdx.x; g < a_.plan.groups; g += kThreads) {
      const int32_t f = a_.family[g];
      if (f >= 0 && below(g, order_image(scores_[g]), f)) atomicAdd(&a_.count[f], 1);  // integers: exact
    }
    __syncthreads();
  }

  // Groups with this score.
  __device__ int64_t total_with(uint64_t image) {
    int64_t mine = 0;
    for (int32_t g = threadIdx.x; g < a_.plan.groups; g += kThreads)
      mine += order_image(scores_[g]) == image;
    return sum(mine);
  }

  // Over all threads, and the same in each.
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

  // Of the index of a group.
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

  __device__ int64_t cost_without() {
    for (int32_t f = threadIdx.x; f < a_.plan.families; f += kThreads) a_.gone[f] = 0;
    __syncthreads();
    return cost();
  }

  // Sets gone[].
  __device__ int64_t cost_at(const Threshold& t) {
    count([&](int32_t g, uint64_t image, int32_t) {
      return image < t.image || (image == t.image && g <= t.index);
    });
    for (int32_t f = threadIdx.x; f < a_.plan.families; f += kThreads) {
      a_.gone[f] =
          static_cast<int32_t>(groups_to_prune(size(f), a_.count[f], a_.limits[f], a_.round_to));
    }
    __syncthreads();
    return cost();
  }

  __device__ int32_t size(int32_t f) const {
    return a_.plan.family_start[f + 1] - a_.plan.family_start[f];
  }

  // Of gone[], the same in every thread.
  __device__ int64_t cost() {
    const CostModel& c = a_.cost;
    for (int32_t x = threadIdx.x; x < c.axes; x += kThreads) {
      int64_t kept = c.axis_fixed[x];
      for (int64_t e = c.axis_start[x]; e < c.axis_start[x + 1]; ++e) {
        const int32_t f = static_cast<int32_t>(c.entry_family[e]);
        kept += c.entry_count[e] * (size(f) - a_.gone[f]);
      }
      a_.axis[x] = kept;
    }
    __syncthreads();
    int64_t mine = 0;
    for (int32_t k = threadIdx.x; k < c.terms; k += kThreads)
      mine += c.term_coefficient[k] * a_.axis[c.term_rows[k]] * a_.axis[c.term_cols[k]];
    return sum(mine);
  }

  // Marks the gone[f] lowest groups of each family, all families at once: image[f] becomes the image of
  // the last one that goes, last[f] its index.
  __device__ void select() {
    for (int32_t f = threadIdx.x; f < a_.plan.families; f += kThreads) {
      a_.image[f] = 0;
      a_.last[f] = 0;
      a_.left[f] = a_.gone[f];
    }
    __syncthreads();
    for (int bit = kImageBits - 1; bit >= 0; --bit) {
      // Groups that agree with image[f] above this bit and have a 0 in it.
      count([&](int32_t, uint64_t image, int32_t f) { return image >> bit == a_.image[f] >> bit; });
      descend(a_.image, uint64_t{1} << bit);
    }
    // Of equal scores, the lowest indices; of most families none or all of them go.
    count([&](int32_t, uint64_t image, int32_t f) { return image == a_.image[f]; });
    bool some = false;
    for (int32_t f = threadIdx.x; f < a_.plan.families; f += kThreads) some |= a_.left[f] < a_.count[f];
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
      a_.mask[g] = a_.gone[f] > 0 && (image < a_.image[f] || (image == a_.image[f] && g <= a_.last[f]));
    }
  }

  // The element wanted is the left[f]-th one: if fewer lie in the lower half, it is in the upper.
  template <class Prefix>
  __device__ void descend(Prefix* prefix, Prefix half) {
    for (int32_t f = threadIdx.x; f < a_.plan.families; f += kThreads) {
      if (a_.left[f] > a_.count[f]) {
        a_.left[f] -= a_.count[f];
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

  const Arguments& a_;
  const Score* scores_;
};

template <class Score>
__global__ void __launch_bounds__(kThreads)
    partition_kernel(const __grid_constant__ Arguments arguments) {
  Search<Score>(arguments).run();
}

std::tuple<Tensor, Tensor, Tensor> partition(const Tensor& scores, const Tensor& tables,
                                             const std::vector<int64_t>& layout,
                                             const Tensor& cost_tables,
                                             const std::vector<int64_t>& cost_layout,
                                             const Tensor& limits, int64_t round_to,
                                             const Tensor& budget) {
  constexpr const char* kOp = "partition";
  Arguments a{};
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
  const Tensor wide = empty({families + a.cost.axes}, ScalarType::Long);
  const Tensor narrow = empty({groups + 4 * families}, ScalarType::Int);
  a.scores = scores.const_data_ptr();
  a.limits = limits.const_data_ptr<int64_t>();
  a.budget = budget.const_data_ptr<int64_t>();
  a.round_to = round_to;
  a.mask = mask.mutable_data_ptr<bool>();
  a.reached = reached.mutable_data_ptr<int64_t>();
  a.status = status.mutable_data_ptr<int32_t>();
  a.image = static_cast<uint64_t*>(wide.mutable_data_ptr());
  a.axis = wide.mutable_data_ptr<int64_t>() + families;
  a.family = narrow.mutable_data_ptr<int32_t>();
  a.count = a.family + groups;
  a.gone = a.count + families;
  a.left = a.gone + families;
  a.last = a.left + families;
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
