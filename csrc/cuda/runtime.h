// The CUDA runtime as the ops use it: the caller's stream and device, and how every kernel is started.
//
// Nothing here links to torch's CUDA libraries, so that the extension also loads with a CPU-only torch,
// which has none. No CUDA op can be called there.
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
  cudaGetLastError();  // clears it, or the next launch would report it again
  fail(op, "CUDA: ", cudaGetErrorString(error));
}

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// Looks the function up in the library that torch has loaded. A weak reference would stay null: torch
// loads the library with local scope.
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

// Makes a device current, for torch and for the CUDA runtime that starts our kernels. Ours is linked
// statically, torch's is a library of its own, and each may remember a current device: so both are told.
// At the end torch's guard sets the driver's context back.
class DeviceScope {
 public:
  DeviceScope(const char* op, int32_t device) : guard_(device) { check_cuda(op, cudaSetDevice(device)); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// Makes the device of a tensor current and finds the caller's stream on it.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& tensor)
      : scope_(op, tensor.get_device_index()), stream_(current_stream(op, tensor)) {}
  cudaStream_t stream() const { return stream_; }

 private:
  DeviceScope scope_;
  cudaStream_t stream_;
};

// The streams on which kernels use a Bound's memory, other than the one it was allocated on.
class Streams : public PendingKernels {
 public:
  Streams(int32_t device, cudaStream_t home) : device_(device), home_(home) {}
  Streams(const Streams&) = delete;
  ~Streams() override {
    for (const auto& [stream, event] : last_) cudaEventDestroy(event);
  }

  void record(const char* op, cudaStream_t stream) {
    if (is_capturing(op, stream)) {
      captured_ = true;
    } else if (stream != home_) {
      cudaEvent_t& event = last_[stream];
      if (!event) check_cuda(op, cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
      check_cuda(op, cudaEventRecord(event, stream));
    }
  }

  // Torch hands freed memory out again in the order of the stream it was allocated on, `home_`. So
  // `home_` is made to wait for the last use on every other stream.
  bool allow_free() override try {
    if (captured_) return false;
    if (last_.empty()) return true;
    const DeviceScope here("release",
                           device_);  // `home_` may be the default stream, which is the current device's
    if (is_capturing("release", home_)) return false;  // the wait would become part of the graph
    for (const auto& [stream, event] : last_)
      check_cuda("release", cudaStreamWaitEvent(home_, event, 0));
    return true;
  } catch (const std::exception&) {
    return false;  // the kernels may still run: keep the memory
  }

 private:
  int32_t device_;
  cudaStream_t home_;
  bool captured_ = false;
  std::unordered_map<cudaStream_t, cudaEvent_t> last_;  // the last use on each
};

// Every op calls this after it has started kernels that use a Bound's memory.
inline void record_use(const char* op, const Bound& bound, cudaStream_t stream) {
  static_cast<Streams&>(*bound.pending).record(op, stream);
}

// Blocks of `kernel` that are resident on the current device at once. Launch no more: a block too many
// starts only when another has ended, so the launch takes nearly twice as long, and in a cooperative
// launch, whose grid waits for all of its blocks, it is an error.
template <class Kernel>
int resident_blocks(const char* op, Kernel kernel, int threads) {
  int device = 0, sms = 0, blocks_per_sm = 0;
  check_cuda(op, cudaGetDevice(&device));
  check_cuda(op, cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  check_cuda(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, threads, 0));
  return std::max(1, sms * blocks_per_sm);
}

// cooperative: the grid may wait for itself, and all of its blocks have to be resident.
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
