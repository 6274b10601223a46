// How threads lie over a matrix: the size of a block, the columns a thread owns and how it loads and
// stores them, and the arithmetic of the element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "../matrix.h"

namespace ocsfast::cuda {

// The launch shapes below are argued from the compiled code for sm_90 (`nvcc -Xptxas -v`, `cuobjdump
// -sass`) and from what an SM holds. No GPU has timed the alternatives yet.

// Threads of a block. A block waits for itself several times a tile, and an SM stays busy meanwhile only
// if other blocks are resident: of four blocks of 256 three go on, of one block of 1024 none would.
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Resident blocks per SM that `__launch_bounds__` promises. float: 4 × 256 threads leave 64 registers a
// thread, enough for the innermost vector loops in float32 not to spill, or hardly: sgd_step_ reloads 1
// word a turn (docs/performance.md has the others). With 5 blocks, 48 registers, it reloads 13. With 2
// it would reload none, but have half as many loads in flight: 32 warps with three or four of 16 bytes
// each are 48 to 64 KB, where latency × bandwidth asks for about 20 KB an SM of an H100, and not every
// warp is loading at any time. double: 2, since a number takes two registers.
template <class A>
constexpr int kBlocksPerSm = std::is_same_v<A, double> ? 2 : 4;

// Columns a thread owns. Packed: neighbours, as many as the widest load brings, 16 bytes. Where a band
// does not start at a multiple of 16 bytes, single elements instead, and at most 4 of them: each takes a
// load and an address, and 8 halves would take more registers than a thread has.
constexpr int kPackBytes = 16;
constexpr int kMaxSingles = 4;
template <class T, bool kPacked>
constexpr int kColumns =
    kPackBytes / sizeof(T) < kMaxSingles || kPacked ? kPackBytes / sizeof(T) : kMaxSingles;

// The type in which an element of type T is computed.
template <class T>
using accumulator_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float to_number(float v) {
  return v;
}
__device__ inline double to_number(double v) {
  return v;
}
__device__ inline float to_number(__half v) {
  return __half2float(v);
}
__device__ inline float to_number(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

template <class T>
__device__ T from_number(accumulator_t<T> v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return v;
  }
}

template <class T>
constexpr DType kDType = std::is_same_v<T, float>    ? DType::kFloat
                         : std::is_same_v<T, double> ? DType::kDouble
                         : std::is_same_v<T, __half> ? DType::kHalf
                                                     : DType::kBFloat16;

// The threads of a block as a rectangle over bands of `width` elements: 2 ** log_across of them side by
// side, as few as cover a band with `columns` elements each, and the rest below one another, a row each.
// So a narrow matrix keeps all threads busy too: a depthwise 3x3 convolution has 9 elements a row.
struct ThreadLayout {
  int log_across;

  __device__ ThreadLayout(int32_t width, int columns) : log_across(0) {
    while (across() < kThreads && across() * columns < width) ++log_across;
  }
  __device__ int across() const { return 1 << log_across; }
  __device__ int deep() const { return kThreads >> log_across; }
  __device__ int x() const { return static_cast<int>(threadIdx.x) & (across() - 1); }
  __device__ int y() const { return static_cast<int>(threadIdx.x) >> log_across; }
  // Warps that share a row.
  __device__ int warps_across() const { return max(1, across() / kWarp); }
};

// The columns of a tile that a thread owns. Packed: neighbours. Else `stride` apart, so that
// neighbouring threads load neighbouring elements. Columns are counted from the first one of the tile.
template <class T, bool kPacked>
struct ThreadColumns {
  static constexpr bool kIsPacked = kPacked;
  static constexpr int kCount = kColumns<T, kPacked>;
  int first, stride;
  uint32_t end;  // columns from here on do not exist

  __device__ ThreadColumns(const ThreadLayout& layout, uint32_t columns)
      : first(kPacked ? layout.x() * kCount : layout.x()),
        stride(kPacked ? 1 : layout.across()),
        end(columns) {}
  __device__ uint32_t at(int k) const { return first + k * stride; }
  __device__ bool has(int k) const { return at(kPacked ? 0 : k) < end; }

  __device__ void load(const T* band, T (&v)[kCount]) const {
    if constexpr (kPacked) {
      if (!has(0)) return;
      const uint4 pack = *reinterpret_cast<const uint4*>(band + first);
      memcpy(v, &pack, sizeof(pack));
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (has(k)) v[k] = band[at(k)];
      }
    }
  }
  // A pack is stored whole, of single elements those whose bit is set in `wanted`.
  __device__ void store(T* band, const T (&v)[kCount], uint32_t wanted) const {
    if constexpr (kPacked) {
      if (!has(0)) return;
      uint4 pack;
      memcpy(&pack, v, sizeof(pack));
      *reinterpret_cast<uint4*>(band + first) = pack;
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (has(k) && (wanted >> k & 1)) band[at(k)] = v[k];
      }
    }
  }
};

// The part of a task that a block walks between two barriers: `rows` rows from first_row on and, in
// their bands, the columns from first_col on. All its elements lie within 2 ** 31 of one another, so
// offsets have 32 bits.
struct Tile {
  Task task;
  int32_t first_row, rows, width;
  uint32_t first_col;
  bool any_active_row;  // the penalty is active in one of its rows
};

}  // namespace ocsfast::cuda
