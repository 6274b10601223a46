// How many groups each family keeps, and what that costs, by all threads of a block.
#pragma once

#include "../arguments.h"
#include "../cost.h"
#include "../order.h"
#include "counter.cuh"

namespace ocsfast::cuda {

struct Kept {
  const PartitionArguments& in;
  int64_t* counts;  // [families], and then the sizes of all axes; in shared or in scratch memory
  int64_t* sums;    // [kWarps] in shared memory
  int thread = static_cast<int>(threadIdx.x);

  __device__ int64_t& operator[](int32_t f) const { return counts[f]; }

  __device__ int32_t size(int32_t f) const {
    return in.plan.family_start[f + 1] - in.plan.family_start[f];
  }

  __device__ int32_t tied(int32_t f) const { return in.ties ? static_cast<int32_t>(in.ties[f]) : f; }

  __device__ int64_t to_prune(int32_t f, int64_t below) const {
    return groups_to_prune(size(f), below, in.limits[f], in.units ? in.units[f] : 1);
  }

  // Gives tied families the largest of their counts. A barrier follows and one has to precede it.
  __device__ void share_largest() const {
    if (!in.ties) return;
    for (int32_t f = thread; f < in.plan.families; f += kThreads) {
      if (tied(f) != f)
        atomicMax(reinterpret_cast<unsigned long long*>(counts + tied(f)),
                  static_cast<unsigned long long>(counts[f]));
    }
    __syncthreads();
    for (int32_t f = thread; f < in.plan.families; f += kThreads) {
      if (tied(f) != f) counts[f] = counts[tied(f)];
    }
    __syncthreads();
  }

  // The cost of the counts, in every thread. A barrier has to precede it.
  __device__ int64_t cost() const {
    const CostModel& c = in.cost;
    int64_t* const axis = counts + in.plan.families;
    for (int32_t x = thread; x < c.axes; x += kThreads) axis[x] = axis_size(c, x, counts);
    __syncthreads();
    int64_t mine = 0;
    for (int32_t k = thread; k < c.terms; k += kThreads) mine += term_cost(c, k, axis);
    for (int32_t k = thread; k < c.lookups; k += kThreads) mine += lookup_cost(c, k, axis);
    mine = warp_sum(mine);
    if (thread % kWarp == 0) sums[thread / kWarp] = mine;
    __syncthreads();
    int64_t sum = 0;
    for (int k = 0; k < kWarps; ++k) sum += sums[k];
    return sum;
  }
};

}  // namespace ocsfast::cuda
