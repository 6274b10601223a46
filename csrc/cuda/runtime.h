// The CUDA runtime as the ops use it: the caller's stream, the device, and the one way to start a
// kernel.
//
// Nothing here links to torch's CUDA libraries: the extension also loads beside a CPU-only torch, where
// they do not exist and no CUDA op can be called.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <unordered_map>

#include "../bound.h"

namespace ocsfast::cuda {

inline void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report this error again
  fail(op, "CUDA: ", cudaGetErrorString(error));
}

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

inline bool is_capturing(const char* op, cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(op, cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// Makes a device current for torch and for the runtime that starts our kernels. That one is linked
// statically, beside the one torch loads. Each may keep its own note of the current device, so both are
// told; torch's guard sets the driver's context back in the end.
class DeviceScope {
 public:
  DeviceScope(const char* op, int32_t device) : guard_(device) { check_cuda(op, cudaSetDevice(device)); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The device of a tensor, current, and the caller's stream on it.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& tensor)
      : scope_(op, tensor.get_device_index()), stream_(current_stream(op, tensor)) {}
  cudaStream_t stream() const { return stream_; }

 private:
  DeviceScope scope_;
  cudaStream_t stream_;
};

// The streams beside the one it was allocated on whose kernels use a Bound's memory.
class Streams : public PendingKernels {
 public:
  Streams(int32_t device, cudaStream_t home) : device_(device), home_(home) {}
  Streams(const Streams&) = delete;
  ~Streams() override {
    for (const auto& [stream, event] : last_) cudaEventDestroy(event);
  }

  void note(const char* op, cudaStream_t stream) {
    if (is_capturing(op, stream)) {
      captured_ = true;
    } else if (stream != home_) {
      cudaEvent_t& event = last_[stream];
      if (!event) check_cuda(op, cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
      check_cuda(op, cudaEventRecord(event, stream));
    }
  }

  // Memory that torch gets back is given out again in the order of `home_`, which from now on runs after
  // what was started elsewhere.
  bool allow_free() override try {
    if (captured_) return false;
    if (last_.empty()) return true;
    const DeviceScope here("release", device_);        // the default stream is the current device's
    if (is_capturing("release", home_)) return false;  // a wait would become part of somebody's graph
    for (const auto& [stream, event] : last_)
      check_cuda("release", cudaStreamWaitEvent(home_, event, 0));
    return true;
  } catch (const std::exception&) {
    return false;  // what is not known to be over is kept
  }

 private:
  int32_t device_;
  cudaStream_t home_;
  bool captured_ = false;
  std::unordered_map<cudaStream_t, cudaEvent_t> last_;  // the last use on each
};

// After kernels that use a Bound's memory have been started.
inline void used_on(const char* op, const Bound& bound, cudaStream_t stream) {
  static_cast<Streams&>(*bound.pending).note(op, stream);
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

// cooperative: the grid may wait for itself; all of its blocks have to be resident.
template <class... Args>
void launch(const char* op, void (*kernel)(Args...), int blocks, int threads, bool cooperative,
            cudaStream_t stream, const std::common_type_t<Args>&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace ocsfast::cuda
