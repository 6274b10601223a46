#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "runtime.h"

namespace ocsfast::cuda {
namespace {

// One block: a hundred families of a few hundred groups are some 30 KB, and a second block would need
// another launch or a barrier to add up the results. 1024 threads, the most there are: 32 warps, a
// family each.
constexpr int kThreads = 1024;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Each warp compares one family. Then thread 0 adds up the families of this round, in their order.
__global__ void __launch_bounds__(kThreads)
    jaccard_kernel(Plan plan, const bool* a, const bool* b, double* out) {
  __shared__ double alike[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double sum = 0;
  int64_t layers = 0;
  for (int32_t first = 0; first < plan.families; first += kWarps) {
    const int32_t f = first + warp;
    if (f < plan.families) {
      int both = 0, either = 0;
      for (int32_t g = plan.family_start[f] + lane; g < plan.family_start[f + 1]; g += kWarp) {
        both += !a[g] && !b[g];
        either += !a[g] || !b[g];
      }
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        both += __shfl_down_sync(~0u, both, offset);
        either += __shfl_down_sync(~0u, either, offset);
      }
      if (lane == 0) alike[warp] = either ? static_cast<double>(both) / either : 1.0;
    }
    __syncthreads();
    for (int32_t k = 0; threadIdx.x == 0 && k < min(kWarps, plan.families - first); ++k) {
      // Without a fused multiply-add, so that the sum is the CPU's to the bit.
      sum = __dadd_rn(sum, __dmul_rn(alike[k], plan.family_layers[first + k]));
      layers += plan.family_layers[first + k];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *out = layers ? sum / static_cast<double>(layers) : 1.0;
}

Tensor jaccard(const Tensor& mask_a, const Tensor& mask_b, const Tensor& tables,
               const std::vector<int64_t>& layout) {
  constexpr const char* kOp = "jaccard";
  const auto& [plan, a, b] = check_jaccard(kOp, mask_a, mask_b, tables, layout);
  const OnDevice here(kOp, tables);
  Tensor result = torch::stable::new_empty(tables, {}, ScalarType::Double);
  launch(kOp, jaccard_kernel, 1, kThreads, false, here.stream(), plan, a, b,
         result.mutable_data_ptr<double>());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("jaccard", TORCH_BOX(&jaccard));
}

}  // namespace ocsfast::cuda
