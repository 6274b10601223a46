// Gathering the sums that a walk leaves: a thread's to a block's, a block's to scratch memory, and from
// there, after a barrier of the grid, to slices.
//
// No atomics: everything is added up in an order that depends on the plan alone, so a result is the same
// to the bit at every call.
#pragma once

#include "work.cuh"

namespace ocsfast::cuda {

// How two sums become one.
struct Sum {
  template <class V>
  static __device__ V combine(V a, V b) {
    return a + b;
  }
};
struct Largest {
  template <class V>
  static __device__ V combine(V a, V b) {
    return a > b || a != a ? a : b;  // NaN wins
  }
};

// Row sums that a block keeps in shared memory: rows × the warps that share one, 4 KB of float. A task
// with more is walked in several tiles.
constexpr int kRowSlots = 1024;
// Terms of a sum that one lane adds up alone, 32 sums a warp at a time. A longer sum would hold up the
// other 31 lanes, so the whole warp adds it up, 32 terms at a time.
constexpr int kTermsPerLane = 16;

// Adds up over a warp's lanes, or as many neighbours of them, that share kRows rows. Lane x is left with
// the sum of row `mine` of sums[0 .. kRows); returns false where another lane has the same. While there
// are several rows, each step hands half of them over: of four rows over 32 lanes this takes 6 shuffles,
// each by itself would take 20.
template <class Reduce, class C, int kRows>
__device__ bool add_over_lanes(C (&sums)[kRows], int x, int lanes, int& mine) {
  int distance = lanes / 2;
  mine = 0;
#pragma unroll
  for (int half = kRows / 2; half > 0; half /= 2, distance /= 2) {
    const bool upper = x & distance;
#pragma unroll
    for (int u = 0; u < half; ++u) {
      const C kept = upper ? sums[half + u] : sums[u], given = upper ? sums[u] : sums[half + u];
      sums[u] = Reduce::combine(kept, __shfl_xor_sync(~0u, given, distance));
    }
    mine = 2 * mine + upper;
  }
#pragma unroll
  for (; distance > 0; distance /= 2)
    sums[0] = Reduce::combine(sums[0], __shfl_xor_sync(~0u, sums[0], distance));
  return x % (lanes / kRows) == 0;
}

// Adds a thread's sums of the rows `row`, `row` + deep, … of a tile to the slots of its warp:
// slots[warps across][rows]. All threads of the block call it.
template <class Reduce, class A, class C, int kRows>
__device__ void add_row_sums(const ThreadLayout& layout, C (&sums)[kRows], int32_t row, int32_t rows,
                             A* slots) {
  A* own_slots = slots + (layout.x() / kWarp * rows + row);
  const auto add = [&](int u, C sum) {  // no other thread writes to its slot
    const int32_t below = u * layout.deep();
    if (row + below < rows) own_slots[below] = Reduce::combine(own_slots[below], static_cast<A>(sum));
  };
  if (layout.across() >= kWarp) {  // with what is constant here the compiler knows each step
    int mine;
    if (add_over_lanes<Reduce>(sums, layout.x() % kWarp, kWarp, mine)) add(mine, sums[0]);
    return;
  }
#pragma unroll 1
  for (int distance = layout.across() / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int u = 0; u < kRows; ++u)
      sums[u] = Reduce::combine(sums[u], __shfl_xor_sync(~0u, sums[u], distance));
  }
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    if (layout.x() == 0) add(u, sums[u]);
  }
}

// Writes a tile's row sums to scratch memory. All threads of the block call it.
template <class Reduce, class A>
__device__ void write_row_sums(const Tile& tile, const ThreadLayout& layout, const A* slots,
                               A* row_sums) {
  for (int32_t r = threadIdx.x; r < tile.rows; r += kThreads) {
    double sum = 0;
    for (int k = 0; k < layout.warps_across(); ++k)
      sum = Reduce::combine(sum, static_cast<double>(slots[k * tile.rows + r]));
    row_sums[r] = static_cast<A>(sum);
  }
}

// Adds the column sums of a tile to those of its task in scratch memory: first over the threads of a
// warp that own the same columns, then over warps and over each column's run. All threads of the block
// call it. slots: [kThreads * columns of a thread].
template <class Reduce, class A, class C, class Columns>
__device__ void add_column_sums(const Work& work, const Matrix& m, const Tile& tile,
                                const ThreadLayout& layout, const Columns& columns,
                                C (&sums)[Columns::kCount], A* slots) {
  for (int distance = kWarp / 2; distance >= layout.across(); distance /= 2) {
#pragma unroll
    for (int k = 0; k < Columns::kCount; ++k)
      sums[k] = Reduce::combine(sums[k], __shfl_xor_sync(~0u, sums[k], distance));
  }
  const uint32_t tile_columns = layout.across() * Columns::kCount;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp / layout.warps_across();
  if (static_cast<int>(threadIdx.x) % kWarp < layout.across()) {
#pragma unroll
    for (int k = 0; k < Columns::kCount; ++k)
      slots[warp_row * tile_columns + columns.at(k)] = static_cast<A>(sums[k]);
  }
  __syncthreads();
  const int64_t begin = tile.first_col,
                end = min(tile.first_col + tile_columns, static_cast<uint32_t>(tile.width));
  A* const partial =
      static_cast<A*>(work.partials) + m.first_partial + static_cast<int64_t>(tile.task.number) * m.cols;
  for (int64_t c = begin / m.run + threadIdx.x; c * m.run < end; c += kThreads) {
    const bool goes_on = c * m.run < begin || tile.first_row > tile.task.first_row;
    double sum = goes_on ? static_cast<double>(partial[c]) : 0.0;
    for (int64_t j = max(c * m.run, begin); j < min((c + 1) * m.run, end); ++j) {
      for (int k = 0; k < kWarps / layout.warps_across(); ++k)
        sum = Reduce::combine(sum, static_cast<double>(slots[k * tile_columns + (j - begin)]));
    }
    partial[c] = static_cast<A>(sum);
  }
  __syncthreads();
}

// Takes sums of many terms. Short ones by a lane each, neighbours by neighbours, which then read
// neighbouring memory. A long one would hold up the other 31 lanes: a warp each, and neighbours by warps
// far apart, since where one is long the next is likely to be long too. The whole grid calls it.
//   count(i)                     the terms of sum i; below 0: there is nothing to do
//   part(i, first, stride)       adds up its terms first, first + stride, …
//   write(i, sum)
template <class Reduce, class Count, class Part, class Write>
__device__ void add_up_each(int32_t sums, const Count& count, const Part& part, const Write& write) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = thread; i < sums; i += threads) {
    const auto own = static_cast<int32_t>(i);
    const int32_t terms = count(own);
    if (terms >= 0 && terms <= kTermsPerLane) write(own, terms ? part(own, 0, 1) : 0);
  }
  for (int64_t base = thread / kWarp; base < sums; base += threads) {
    const int64_t i = base + lane * (threads / kWarp);
    const bool is_long = i < sums && count(static_cast<int32_t>(i)) > kTermsPerLane;
    for (uint32_t rest = __ballot_sync(~0u, is_long); rest; rest &= rest - 1) {
      const auto own =
          static_cast<int32_t>(base + (__ffs(static_cast<int>(rest)) - 1) * (threads / kWarp));
      auto sum = part(own, lane, kWarp);
      for (int distance = kWarp / 2; distance > 0; distance /= 2)
        sum = Reduce::combine(sum, __shfl_xor_sync(~0u, sum, distance));
      if (lane == 0) write(own, sum);
    }
  }
}

// Writes the sums of this launch's slices, or only of the pruned ones, to `out` and, unless it is null,
// to `copy`. They are 0 for a tensor where has(tensor) is false. The whole grid calls it, after a
// barrier.
template <class Reduce, class A, class Has>
__device__ void gather_slices(const Work& work, bool pruned_only, const Has& has, A* out, A* copy) {
  const Plan& plan = work.plan;
  const auto count = [&](int32_t slice) {
    if (pruned_only && !is_pruned(work, slice)) return -1;
    const int32_t t = plan.slice_tensor[slice];
    if (t < work.first_tensor || t >= work.first_tensor + work.tensors) return -1;
    if (work.matrices[t].tasks == 0 || !has(t)) return 0;
    return plan.slice_start[slice + 1] - plan.slice_start[slice];
  };
  // A term is a row's sum, or a column's sums over all tasks.
  const auto part = [&](int32_t slice, int32_t first, int32_t stride) {
    const Matrix& m = work.matrices[plan.slice_tensor[slice]];
    const A* partials = static_cast<const A*>(work.partials) + m.first_partial;
    const int32_t end = plan.slice_start[slice + 1], tasks = m.tasks;
    double sum = 0;
    for (int32_t k = plan.slice_start[slice] + first; k < end; k += stride) {
      const int32_t entry = plan.slice_entry[k];
      if (entry < plan.num_rows) {
        sum = Reduce::combine(sum, static_cast<double>(static_cast<const A*>(work.row_sums)[entry]));
        continue;
      }
      const A* term = partials + (entry - plan.num_rows - m.col_base);
#pragma unroll 8
      for (int32_t t = 0; t < tasks; ++t)  // eight loads in flight
        sum = Reduce::combine(sum, static_cast<double>(term[static_cast<int64_t>(t) * m.cols]));
    }
    return sum;
  };
  add_up_each<Reduce>(plan.slices, count, part, [&](int32_t slice, double sum) {
    out[slice] = static_cast<A>(sum);
    if (copy) copy[slice] = static_cast<A>(sum);
  });
}

}  // namespace ocsfast::cuda
