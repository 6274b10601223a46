#include <cooperative_groups.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "runtime.h"
#include "warp.cuh"

namespace ocsfast::cuda {
namespace {

// One block for a family, which has some hundred to some ten thousand groups.
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

// What is added up over the groups of a family. Counts are exact as doubles.
enum Sum { kPruned, kPrunedSize, kSize, kChanged, kBoth, kEither, kSums };
// And over families: `alike` is Eq. 3's quotient times the family's layers.
enum Total { kAlike = kBoth, kLayers = kEither };

// Writes the sums of a family: sums[kSums][families]. The whole block calls it.
template <class Size>
__device__ void add_groups(const CompareArguments& a, int32_t family, double* sums, double* facts) {
  __shared__ double of_warps[kSums][kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t begin = a.plan.family_start[family], end = a.plan.family_start[family + 1];
  const auto* sizes = static_cast<const Size*>(a.sizes);
  double mine[kSums] = {};
#pragma unroll 4
  for (int32_t g = begin + thread; g < end; g += kThreads) {
    const bool pruned = a.mask[g], first = a.first[g], last = a.last[g];
    const auto size = static_cast<double>(sizes[g]);
    mine[kPruned] += pruned;
    mine[kPrunedSize] += pruned ? size : 0.0;
    mine[kSize] += size;
    mine[kChanged] += pruned != last;
    mine[kBoth] += !pruned && !first;
    mine[kEither] += !pruned || !first;
  }
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    mine[k] = warp_sum(mine[k]);
    if (thread % kWarp == 0) of_warps[k][thread / kWarp] = mine[k];
  }
  __syncthreads();
  if (thread < kSums) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += of_warps[thread][w];
    sums[int64_t{thread} * a.plan.families + family] = sum;
    if (thread == kPruned) facts[kFacts + family] = end - begin - sum;
  }
  __syncthreads();
}

// Adds up over all families, one behind the other, as the CPU does it: one thread for each sum. One
// block calls it.
__device__ void add_families(const CompareArguments& a, const double* sums, double* facts) {
  __shared__ double tile[kSums][kThreads];
  __shared__ double totals[kSums];
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t families = a.plan.families;
  double total = 0;
  for (int32_t first = 0; first < families; first += kThreads) {
    const int32_t f = first + thread;
    if (f < families) {
      for (int k = 0; k < kBoth; ++k) tile[k][thread] = sums[int64_t{k} * families + f];
      const double both = sums[int64_t{kBoth} * families + f];
      const double either = sums[int64_t{kEither} * families + f];
      tile[kAlike][thread] = __dmul_rn(either > 0 ? both / either : 1.0, a.plan.family_layers[f]);
      tile[kLayers][thread] = a.plan.family_layers[f];
    }
    __syncthreads();
    for (int k = 0; thread < kSums && k < min(kThreads, families - first); ++k) total += tile[thread][k];
    __syncthreads();
  }
  if (thread < kSums) totals[thread] = total;
  __syncthreads();
  if (thread != 0) return;
  facts[0] = static_cast<double>(*a.cost);
  facts[1] = *a.status;
  facts[2] = totals[kPruned];
  facts[3] = totals[kPrunedSize];
  facts[4] = totals[kSize];
  facts[5] = totals[kLayers] > 0 ? totals[kAlike] / totals[kLayers] : 1.0;
  facts[6] = totals[kChanged];
}

template <class Size>
__global__ void __launch_bounds__(kThreads)
    compare_kernel(const __grid_constant__ CompareArguments a, double* sums, double* facts) {
  for (int32_t f = static_cast<int32_t>(blockIdx.x); f < a.plan.families;
       f += static_cast<int32_t>(gridDim.x))
    add_groups<Size>(a, f, sums, facts);
  cooperative_groups::this_grid().sync();
  if (blockIdx.x == 0) add_families(a, sums, facts);
}

Tensor compare(const Tensor& mask, const Tensor& sizes, const Tensor& cost, const Tensor& status,
               const std::optional<Tensor>& first, const std::optional<Tensor>& last,
               const Tensor& tables, const std::vector<int64_t>& layout) {
  constexpr const char* kOp = "compare";
  const CompareArguments a = check_compare(kOp, mask, sizes, cost, status, first, last, tables, layout);
  const OnDevice here(kOp, tables);
  const int32_t families = a.plan.families;
  const Tensor sums = torch::stable::new_empty(tables, {int64_t{kSums} * families}, ScalarType::Double);
  Tensor facts = torch::stable::new_empty(tables, {kFacts + families}, ScalarType::Double);
  const bool in_double = sizes.scalar_type() == ScalarType::Double;
  const auto kernel = in_double ? compare_kernel<double> : compare_kernel<float>;
  const int blocks = std::clamp(families, 1, resident_blocks(kOp, kernel, kThreads));
  launch(kOp, kernel, blocks, kThreads, true, here.stream(), a, sums.mutable_data_ptr<double>(),
         facts.mutable_data_ptr<double>());
  return facts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("compare", TORCH_BOX(&compare));
}

}  // namespace ocsfast::cuda
