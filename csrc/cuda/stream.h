// The caller's stream, without a link-time dependency on torch's CUDA libraries: the extension also
// loads beside a CPU-only torch, where this function does not exist and no CUDA op can be called.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../checks.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** stream);

namespace ocsfast::cuda {

inline cudaStream_t current_stream(const char* op, const Tensor& tensor) {
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream ||
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != AOTI_TORCH_SUCCESS) {
    fail(op, "this torch has no CUDA stream to run on");
  }
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) fail(op, "CUDA: ", cudaGetErrorString(error));
}

// Blocks of `kernel` that fit on the current device at once: no more are launched, so that a grid can
// wait for itself and no block starts late.
template <class Kernel>
int resident_blocks(const char* op, Kernel kernel, int threads) {
  int device = 0, processors = 0, blocks = 0;
  check_cuda(op, cudaGetDevice(&device));
  check_cuda(op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check_cuda(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
  return std::max(1, processors * blocks);
}

}  // namespace ocsfast::cuda
