// How threads lie over a matrix: the size of a block, the columns a thread owns and how it loads and
// stores them, and the arithmetic of the element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "../matrix.h"
#include "warp.cuh"

namespace ocsfast::cuda {

// Threads of a block. A block waits for itself several times a tile, and an SM stays busy meanwhile only
// if other blocks are resident: of four blocks of 256 three go on, of one block of 1024 none would.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Resident blocks per SM that an op's `__launch_bounds__` promises: as many as leave its vector loops
// the registers they need, 80 a thread for three blocks, 128 for two. With some 30 words to reload a row
// AdamW's penalized step took twice as long on an H200 (16.2 instead of 8.2 ms with 1.1 B parameters).
// With sums in double a number takes two registers.
template <class Op, class T, class A>
constexpr int kBlocksPerSm = std::is_same_v<A, double> ? 2
                             : sizeof(T) == 4          ? Op::kBlocksInFloat
                                                       : Op::kBlocksInHalf;

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

// A thread's elements of one tensor, as they lie in memory. Halves lie two in a word, as they are
// loaded: one by one they would take twice the registers.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  static constexpr int kInWord = sizeof(T) < 4 ? 4 / sizeof(T) : 1;
  using Word = std::conditional_t<kInWord == 2, uint32_t, T>;
  static_assert(kCount % kInWord == 0);
  Word word[kCount / kInWord];
};

// Two halves of a word as numbers, and back, rounded.
__device__ inline void split(uint32_t word, float (&numbers)[2], const __half&) {
  __half2 both;
  memcpy(&both, &word, sizeof(both));
  numbers[0] = __half2float(both.x);
  numbers[1] = __half2float(both.y);
}
__device__ inline void split(uint32_t word, float (&numbers)[2], const __nv_bfloat16&) {
  const uint32_t low = word << 16, high = word & 0xffff0000u;  // the upper half of a float's bits
  memcpy(numbers, &low, sizeof(low));
  memcpy(numbers + 1, &high, sizeof(high));
}
__device__ inline __half2 join(float a, float b, const __half&) {
  return __floats2half2_rn(a, b);
}
__device__ inline __nv_bfloat162 join(float a, float b, const __nv_bfloat16&) {
  return __floats2bfloat162_rn(a, b);
}

template <class T, int kCount>
__device__ void unpack(const Pack<T, kCount>& pack, accumulator_t<T> (&numbers)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; k += Pack<T, kCount>::kInWord) {
    if constexpr (Pack<T, kCount>::kInWord == 2) {
      float two[2];
      split(pack.word[k / 2], two, T());
      numbers[k] = two[0];
      numbers[k + 1] = two[1];
    } else {
      numbers[k] = pack.word[k];
    }
  }
}

// Rounds numbers to T, in the pack and where they are.
template <class T, int kCount>
__device__ void round_into(Pack<T, kCount>& pack, accumulator_t<T> (&numbers)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; k += Pack<T, kCount>::kInWord) {
    if constexpr (Pack<T, kCount>::kInWord == 2) {
      const auto both = join(numbers[k], numbers[k + 1], T());
      memcpy(&pack.word[k / 2], &both, sizeof(both));
    } else {
      pack.word[k] = numbers[k];
    }
  }
  if constexpr (Pack<T, kCount>::kInWord == 2) unpack(pack, numbers);
}

template <class T>
constexpr DType kDType = std::is_same_v<T, float>    ? DType::kFloat
                         : std::is_same_v<T, double> ? DType::kDouble
                         : std::is_same_v<T, __half> ? DType::kHalf
                                                     : DType::kBFloat16;

// The threads of a block as a rectangle over bands of `width` elements: 2 ** log_across of them side by
// side, with `columns` elements each, and the rest below one another, a row each. As few side by side as
// cover a band, so that a narrow matrix keeps all threads busy too: a depthwise 3x3 convolution has 9
// elements a row. Fewer, down to a warp, where more would stand beside the last column: of a row of 192
// packs, 256 threads leave 64 idle, 64 threads take it in three tiles.
struct ThreadLayout {
  int log_across;

  __device__ ThreadLayout(int32_t width, int columns) : log_across(0) {
    const int32_t packs = (width - 1) / columns + 1;
    while (across() < kThreads && across() < packs) ++log_across;
    for (int log = log_across; log > kLogWarp && kEighths * idle(packs, log_across) > packs; --log) {
      if (idle(packs, log - 1) < idle(packs, log_across)) log_across = log - 1;
    }
  }
  __device__ int across() const { return 1 << log_across; }
  __device__ int deep() const { return kThreads >> log_across; }
  __device__ int x() const { return static_cast<int>(threadIdx.x) & (across() - 1); }
  __device__ int y() const { return static_cast<int>(threadIdx.x) >> log_across; }
  // Warps that share a row.
  __device__ int warps_across() const { return max(1, across() / kWarp); }

 private:
  static constexpr int kLogWarp = 5, kEighths = 8;
  // Packs of a row that 2 ** log threads could take and that do not exist.
  static __device__ int32_t idle(int32_t packs, int log) {
    return ((((packs - 1) >> log) + 1) << log) - packs;
  }
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

  // `own`: where the thread's first column is. It exists.
  __device__ void load(const T* own, Pack<T, kCount>& v) const {
    if constexpr (kPacked) {
      v = *reinterpret_cast<const Pack<T, kCount>*>(own);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const T element = has(k) ? own[k * stride] : T(0.0f);
        memcpy(reinterpret_cast<char*>(&v) + k * sizeof(T), &element, sizeof(T));
      }
    }
  }
  // A pack is stored whole, of single elements those whose bit is set in `wanted`.
  __device__ void store(T* own, const Pack<T, kCount>& v, uint32_t wanted) const {
    if constexpr (kPacked) {
      *reinterpret_cast<Pack<T, kCount>*>(own) = v;
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (has(k) && (wanted >> k & 1))
          memcpy(own + k * stride, reinterpret_cast<const char*>(&v) + k * sizeof(T), sizeof(T));
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
