// The emulated runtime of CUDA: launches, barriers, and streams. cuda_runtime.h beside this file says
// what is promised.
#include <link.h>

#include <random>
#include <thread>
#include <vector>

#include "cuda_runtime.h"
#include "fibers.h"

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
namespace {

constexpr unsigned kMaxProcessors = 4;
constexpr unsigned char kPoison = 0xFF;  // as a number NaN or -1, and no value of a bool

// Fills shared memory with kPoison. Shared memory is thread-local memory of this library, and so are a
// few variables that are set afterwards.
int poison(dl_phdr_info* info, size_t, void*) {
  auto* const data = static_cast<unsigned char*>(info->dlpi_tls_data);
  for (int k = 0; data && k < info->dlpi_phnum; ++k) {
    const auto& segment = info->dlpi_phdr[k];
    const auto* own = reinterpret_cast<const unsigned char*>(&threadIdx);
    if (segment.p_type != PT_TLS || own < data || own >= data + segment.p_memsz) continue;
    memset(data, kPoison, segment.p_memsz);
    return 1;
  }
  return 0;
}

std::minstd_rand& randomness() {
  static std::minstd_rand instance;
  return instance;
}

}  // namespace

void barrier(Place place) {
  current->barrier(place);
}
bool barrier_or(bool value, Place place) {
  return current->barrier_or(value, place);
}
void grid_barrier(Place place) {
  current->grid_barrier(place);
}
const uint64_t* exchange(uint32_t mask, uint64_t value, Place place) {
  return current->exchange(mask, value, place);
}

// SMs: another number at every launch, since no result may depend on it.
unsigned processors() {
  return 1 + randomness()() % kMaxProcessors;
}

int run(unsigned blocks, unsigned threads, bool cooperative, const std::function<void()>& kernel) {
  if (cooperative && blocks > kMaxProcessors) return cudaErrorCooperativeLaunchTooLarge;
  if (blocks == 0 || threads == 0) return cudaErrorInvalidValue;
  Grid grid(blocks);
  std::vector<std::thread> running;
  for (unsigned b = 0; b < blocks; ++b) {
    running.emplace_back([&, b, seed = randomness()()] {
      threadIdx = {};  // makes the thread allocate its thread-local memory
      if (!dl_iterate_phdr(poison, nullptr)) std::abort();
      blockIdx = {b, 0, 0};
      blockDim = {threads, 1, 1};
      gridDim = {blocks, 1, 1};
      Block block(grid, threads, static_cast<uint32_t>(seed), kernel);
      current = &block;
      block.run();
      current = nullptr;
    });
    if (!cooperative) running.back().join();
  }
  for (std::thread& thread : running) {
    if (thread.joinable()) thread.join();
  }
  return cudaSuccess;
}

}  // namespace emulated

// Every call on a stream runs when it is made. Calls are counted, so that a test can ask what was waited
// for.
namespace {

struct Log {
  uintptr_t stream = 0;
  bool capturing = false;
  int64_t events = 0, records = 0, waits = 0;
};
Log log_of_streams;

}  // namespace

namespace emulated {
int32_t current_stream(int32_t, void** stream) {
  *stream = reinterpret_cast<void*>(log_of_streams.stream);
  return 0;
}
}  // namespace emulated

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = log_of_streams.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(++log_of_streams.events);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  ++log_of_streams.records;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  ++log_of_streams.waits;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) {
  --log_of_streams.events;
  return cudaSuccess;
}

#define EMULATED_EXPORT extern "C" __attribute__((visibility("default")))

EMULATED_EXPORT void emulated_use_stream(int64_t stream, bool capturing) {
  log_of_streams.stream = static_cast<uintptr_t>(stream);
  log_of_streams.capturing = capturing;
}
// Writes how many events exist, and how many records and waits there were so far.
EMULATED_EXPORT void emulated_streams(int64_t* counts) {
  counts[0] = log_of_streams.events;
  counts[1] = log_of_streams.records;
  counts[2] = log_of_streams.waits;
}
