// The caller's stream, without a link-time dependency on torch's CUDA libraries: the extension also
// loads beside a CPU-only torch, where they do not exist and no CUDA op can be called.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../checks.h"

namespace ocsfast::cuda {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// In the library that torch has loaded, by name: torch does not load it into the global scope, so a weak
// reference to the function would stay null.
inline CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<CurrentStream>(symbol);
}

inline cudaStream_t current_stream(const char* op, const Tensor& tensor) {
  static const CurrentStream get = find_current_stream();
  void* stream = nullptr;
  if (!get || get(tensor.get_device_index(), &stream) != AOTI_TORCH_SUCCESS) {
    fail(op, "this torch has no CUDA stream to run on");
  }
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report this error again
  fail(op, "CUDA: ", cudaGetErrorString(error));
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
