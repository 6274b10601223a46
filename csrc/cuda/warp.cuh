// What the lanes of a warp add up together. All of them call it.
#pragma once

#include <cuda_runtime.h>

namespace ocsfast::cuda {

constexpr int kWarp = 32;

// The sum over all lanes, in each of them. Always added up in the same order.
template <class V>
__device__ V warp_sum(V value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// The sum over the lanes up to each one.
template <class V>
__device__ V warp_scan(V value) {
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const V before = __shfl_up_sync(~0u, value, distance);
    if (static_cast<int>(threadIdx.x) % kWarp >= distance) value += before;
  }
  return value;
}

}  // namespace ocsfast::cuda
