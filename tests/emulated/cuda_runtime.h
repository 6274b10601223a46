// Takes the place of CUDA's header: what csrc/cuda uses of it, on the CPU.
//
// A block is a thread of the operating system; its threads are fibers that take turns in a random order
// (fibers.h). A barrier or a warp operation ends the process if threads come to it from different
// places, or if some have left. Shared memory is filled with NaN before a block begins. A device has 1
// to 4 processors, another number at every launch, so that a block takes task after task.
#pragma once

#include <math.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>

// The ops are registered for the CPU, in the place of its own kernels.
#define CUDA CPU

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __grid_constant__
#define __launch_bounds__(...)
#define __builtin_assume(condition) ((condition) ? void() : std::abort())

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned all = 1) : x(all) {}
};
struct uint3 {
  unsigned x, y, z;
};

extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

// Where in the source a thread waits.
struct Place {
  const char* file;
  int line;
};

void barrier(Place place);
bool barrier_or(bool value, Place place);
void grid_barrier(Place place);
// Hands a value to the other lanes of the warp. Returns the values of all 32.
const uint64_t* exchange(uint32_t mask, uint64_t value, Place place);

// Launches a kernel. cooperative: all blocks run at the same time.
int run(unsigned blocks, unsigned threads, bool cooperative, const std::function<void()>& kernel);
unsigned processors();

template <class T>
T lane_of(const uint64_t* values, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  T value;
  memcpy(&value, values + lane, sizeof(T));
  return value;
}

template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

}  // namespace emulated

#define EMULATED_HERE                  \
  emulated::Place {                    \
    __builtin_FILE(), __builtin_LINE() \
  }

// `place` is the caller's line, by default.
inline void __syncthreads(emulated::Place place = EMULATED_HERE) {
  emulated::barrier(place);
}
inline int __syncthreads_or(int value, emulated::Place place = EMULATED_HERE) {
  return emulated::barrier_or(value != 0, place);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, emulated::Place place = EMULATED_HERE) {
  const uint64_t* values = emulated::exchange(mask, emulated::bits_of(value), place);
  return emulated::lane_of<T>(values, (threadIdx.x % 32) ^ lanes);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned lanes, emulated::Place place = EMULATED_HERE) {
  const uint64_t* values = emulated::exchange(mask, emulated::bits_of(value), place);
  const unsigned lane = threadIdx.x % 32;
  return emulated::lane_of<T>(values, lane >= lanes ? lane - lanes : lane);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, emulated::Place place = EMULATED_HERE) {
  return emulated::lane_of<T>(emulated::exchange(mask, emulated::bits_of(value), place), lane % 32u);
}
inline uint32_t __ballot_sync(uint32_t mask, bool value, emulated::Place place = EMULATED_HERE) {
  const uint64_t* values = emulated::exchange(mask, value, place);
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= static_cast<uint32_t>(values[lane]) << lane;
  return votes;
}

template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMin(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < old &&
         !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value &&
         !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline int __popc(uint32_t bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline bool __isGlobal(const void*) {
  return true;
}

using cudaStream_t = struct EmulatedStream*;
using cudaEvent_t = struct EmulatedEvent*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorCooperativeLaunchTooLarge };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
constexpr unsigned cudaEventDisableTiming = 2;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge ? "too many blocks in cooperative launch"
                                                     : "invalid argument";
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(emulated::processors());
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  if (bytes) memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
// Streams and their events are only counted: see emulator.cpp.
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> held(std::forward<Arguments>(arguments)...);
  const bool cooperative = config->numAttrs && config->attrs->val.cooperative;
  return static_cast<cudaError_t>(emulated::run(config->gridDim.x, config->blockDim.x, cooperative,
                                                [&] { std::apply(kernel, held); }));
}
