// Instructions that CUDA C++ has no name for. PTX stands nowhere else.
#pragma once

#include <cuda_runtime.h>

namespace ocsfast::cuda {

// Off by at most two units in the last place; exact at 0.
__device__ inline float approximate_sqrt(float v) {
#ifdef __CUDACC__
  float result;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else  // the tests' emulator
  return sqrtf(v);
#endif
}

}  // namespace ocsfast::cuda
