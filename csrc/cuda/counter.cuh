// Counting groups by 8 bits of a key: a score's image (order.h), and then an index.
//
// A pass takes the next 8 bits. Each block counts its groups in a table, one counter for each value of
// these bits (a bin) and family.
//
// Integers only, whose sums do not depend on the order of atomics.
#pragma once

#include "../order.h"
#include "warp.cuh"

namespace ocsfast::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Scores that a thread loads before it counts the first of them.
constexpr int kUnroll = 4;
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
// The counters of a family: how many groups lie below all bins, the sums of the first, second, … 15th 16
// bins, and the bins. So one load a lane tells how many lie in the bins up to one.
constexpr int kCoarse = 16;
constexpr int kCounters = kCoarse + kBins;
static_assert(kWarp == 2 * kCoarse && kBins == kCoarse * kCoarse);
// A table is read while the next is written and the one after that is set to 0.
constexpr int kTables = 3;
// A block counts so many families at a time in shared memory. Its groups lie in one or two, as a rule.
constexpr int kWindow = 8;
static_assert(kWindow <= kWarps);
// Digits of a double and of an index.
constexpr int kMaxDigits = sizeof(double) + sizeof(int32_t);

// Where a search stands. The digits yet to be found are 0; at its end they are such that groups at or
// below image and index are pruned.
struct Cut {
  uint64_t image;
  uint32_t index;
  int32_t rank;  // of a family: how many of its groups are pruned
  bool open;     // digits are yet to be found
};

// Eight bits of a key, which is a score's image and then an index.
struct Digit {
  bool of_image;
  int shift;
};

// What a block counts of a family: its groups from `begin` to `end`, by the next digit of `cut`.
struct Part {
  int32_t begin, end;
  int32_t below;
  Cut cut;
};

struct CounterShared {
  int32_t bins[kWindow * kBins];
  Part parts[kWindow];
  int32_t first_family;  // of the block's groups
};

// A block's view of the tables of counters: [kTables][families][kCounters].
template <class Score>
struct Counter {
  static constexpr int kImageDigits = sizeof(Score);

  const Plan& plan;
  const Score* scores;
  int32_t* tables;
  CounterShared& shared;
  int thread, warp, lane;
  int32_t begin, end;         // the block's groups
  int digits = kImageDigits;  // of a key

  __device__ Counter(const Plan& plan, const void* scores, int32_t* tables, CounterShared& shared)
      : plan(plan),
        scores(static_cast<const Score*>(scores)),
        tables(tables),
        shared(shared),
        thread(static_cast<int>(threadIdx.x)),
        warp(thread / kWarp),
        lane(thread % kWarp) {
    const int64_t share = (plan.groups + gridDim.x - 1) / gridDim.x;
    begin = static_cast<int32_t>(min(blockIdx.x * share, int64_t{plan.groups}));
    end = static_cast<int32_t>(min(begin + share, int64_t{plan.groups}));
    while (int64_t{1} << kDigitBits * (digits - kImageDigits) < plan.groups) ++digits;
  }

  __device__ int32_t* row(int table, int32_t family) const {
    return tables + (int64_t{table % kTables} * plan.families + family) * kCounters;
  }

  __device__ void clear(int table) const {
    int32_t* const counters = row(table, 0);
    const int64_t all = int64_t{plan.families} * kCounters;
    for (int64_t k = int64_t{blockIdx.x} * kThreads + thread; k < all; k += gridDim.x * kThreads)
      counters[k] = 0;
  }

  // The digit that a pass finds.
  __device__ Digit digit(int pass) const {
    const bool of_image = pass < kImageDigits;
    return {of_image, kDigitBits * ((of_image ? kImageDigits : digits) - 1 - pass)};
  }

  // The bin of a group; -1 or kBins if it lies below or above all keys that begin as the cut does.
  __device__ static int find_bin(Digit digit, const Cut& cut, uint64_t image, int32_t group) {
    if (!digit.of_image && image != cut.image) return image < cut.image ? -1 : kBins;
    const uint64_t key = (digit.of_image ? image : static_cast<uint64_t>(group)) >> digit.shift;
    const uint64_t found = (digit.of_image ? cut.image : cut.index) >> digit.shift;
    if (key >> kDigitBits == found >> kDigitBits) return static_cast<int>(key % kBins);
    return key < found ? -1 : kBins;
  }

  // Adds the block's groups to a table. A warp asks start(family) for the family's cut.
  template <class Start>
  __device__ void count(int table, int pass, const Start& start) {
    const Digit next = digit(pass);
    int32_t first = shared.first_family;
    for (; first < plan.families && plan.family_start[first] < end; first += kWindow) {
      const int families = min(kWindow, plan.families - first);
      for (int k = thread; k < families * kBins; k += kThreads) shared.bins[k] = 0;
      if (warp < families) {
        const int32_t f = first + warp;
        const Part part{max(begin, plan.family_start[f]), min(end, plan.family_start[f + 1]), 0,
                        start(f)};
        if (lane == 0) shared.parts[warp] = part;
      }
      __syncthreads();
      for (int k = 0; k < families; ++k) {
        if (shared.parts[k].cut.open) count(next, shared.parts[k], shared.bins + k * kBins);
      }
      __syncthreads();
      for (int k = thread; k < families * kBins; k += kThreads)
        add(row(table, first + k / kBins), k % kBins, shared.bins[k]);
      if (thread < families && shared.parts[thread].below)
        atomicAdd(row(table, first + thread), shared.parts[thread].below);
      __syncthreads();
    }
  }

  __device__ void count(Digit next, Part& part, int32_t* bins) const {
    const Cut cut = part.cut;
    int32_t below = 0;
    for (int32_t g = part.begin + thread; g < part.end; g += kUnroll * kThreads) {
      Score values[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (u * kThreads < part.end - g) values[u] = scores[g + u * kThreads];
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (u * kThreads >= part.end - g) break;
        const int bin = find_bin(next, cut, order_image(values[u]), g + u * kThreads);
        below += bin < 0;
        if (bin >= 0 && bin < kBins) atomicAdd(bins + bin, 1);
      }
    }
    below = warp_sum(below);
    if (lane == 0 && below) atomicAdd(&part.below, below);
  }

  // Adds to a bin, and to the sum of its 16. A whole warp calls it, for bins one behind the other.
  __device__ static void add(int32_t* counters, int bin, int32_t count) {
    if (count) atomicAdd(counters + kCoarse + bin, count);
    for (int distance = kCoarse / 2; distance > 0; distance /= 2)
      count += __shfl_xor_sync(~0u, count, distance);
    if (bin % kCoarse == 0 && bin / kCoarse + 1 < kCoarse && count)
      atomicAdd(counters + 1 + bin / kCoarse, count);
  }

  // How many groups of a family lie in the bins up to one, or below all. In all lanes of the warp.
  __device__ int32_t up_to(const int32_t* counters, int bin) const {
    const bool wanted = lane < kCoarse ? lane <= bin / kCoarse : lane - kCoarse <= bin % kCoarse;
    const int counter = lane < kCoarse ? lane : bin / kCoarse * kCoarse + lane;
    return warp_sum(wanted ? counters[counter] : 0);
  }

  // The lowest bin up to which `rank` groups of a family lie. exact: no more do. In all lanes.
  __device__ int find_rank(const int32_t* counters, int32_t rank, bool& exact) const {
    const bool low = lane < kCoarse;
    int32_t sum = warp_scan(low ? counters[lane] : 0);
    const int coarse = __popc(__ballot_sync(~0u, low && sum < rank)) - 1;
    const int first = coarse * kCoarse;
    sum = __shfl_sync(~0u, sum, coarse) + warp_scan(low ? counters[kCoarse + first + lane] : 0);
    const int fine = __popc(__ballot_sync(~0u, low && sum < rank));
    exact = __shfl_sync(~0u, sum, fine) == rank;
    return first + fine;
  }

  // Sets the digit of a pass. last: and those after it, so that all groups of the bin are included.
  __device__ void extend(Cut& cut, int pass, int bin, bool last) const {
    const Digit found = digit(pass);
    const uint64_t value = static_cast<uint64_t>(bin) << found.shift;
    const uint64_t rest = last ? (uint64_t{1} << found.shift) - 1 : 0;
    if (found.of_image) {
      cut.image |= value | rest;
      cut.index = last ? ~0u : 0;
    } else {
      cut.index |= static_cast<uint32_t>(value | rest);
    }
    cut.open = !last;
  }
};

}  // namespace ocsfast::cuda
