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
// with more is walked in several tiles. Twice as many would halve the barriers of narrow tasks, and take
// 26 instead of 17 KB of shared memory a block.
constexpr int kRowSlots = 1024;
// Terms of a slice that one lane adds up alone, 32 slices a warp at a time. A longer slice would hold up
// the other 31 lanes, so the whole warp adds it up, 32 terms at a time.
constexpr int kTermsPerLane = 16;

// Adds a thread's sums of the rows `row`, `row` + deep, … of a tile to the slots of its warp:
// slots[warps across][rows].
template <class Reduce, class A, class C, int kRows>
__device__ void add_row_sums(const ThreadLayout& layout, C (&sums)[kRows], int32_t row, int32_t rows,
                             A* slots) {
  for (int distance = min(layout.across(), kWarp) / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int u = 0; u < kRows; ++u)
      sums[u] = Reduce::combine(sums[u], __shfl_xor_sync(~0u, sums[u], distance));
  }
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    const int32_t own = row + u * layout.deep();
    if (own < rows && layout.x() % kWarp == 0) {
      A& slot = slots[layout.x() / kWarp * rows + own];  // no other thread writes to it
      slot = Reduce::combine(slot, static_cast<A>(sums[u]));
    }
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
__device__ void add_column_sums(const Work& work, const Tile& tile, const ThreadLayout& layout,
                                const Columns& columns, C (&sums)[Columns::kCount], A* slots) {
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
  const Matrix& m = work.matrices[tile.task.tensor];
  const int64_t begin = tile.first_col,
                end = min(tile.first_col + tile_columns, static_cast<uint32_t>(tile.width));
  A* partial =
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

// The sum of a slice's terms number, number + stride, …: its row sums, and its tasks' column sums.
template <class Reduce, class A>
__device__ double gather(const Work& work, const Matrix& m, int32_t slice, int32_t number, int stride) {
  const Plan& plan = work.plan;
  const A* row_sums = static_cast<const A*>(work.row_sums);
  const A* partials = static_cast<const A*>(work.partials) + m.first_partial;
  const int32_t end = plan.slice_start[slice + 1];
  double sum = 0;
  for (int32_t k = plan.slice_start[slice]; k < end; ++k) {
    const int32_t entry = plan.slice_entry[k];
    const bool is_row = entry < plan.num_rows;
    const int32_t terms = is_row ? 1 : m.tasks;
    const A* term = is_row ? row_sums + entry : partials + (entry - plan.num_rows - m.col_base);
    for (; number < terms; number += stride)
      sum = Reduce::combine(sum, static_cast<double>(term[static_cast<int64_t>(number) * m.cols]));
    number -= terms;
  }
  return sum;
}

// Writes the sums of this launch's slices, or only of the pruned ones, to `out` and, unless it is null,
// to `copy`. They are 0 for a tensor where has(tensor) is false. The whole grid calls it, after a
// barrier.
template <class Reduce, class A, class Has>
__device__ void gather_slices(const Work& work, bool pruned_only, const Has& has, A* out, A* copy) {
  const Plan& plan = work.plan;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  // Neighbouring slices go to different warps: where one is long, the next is likely to be long too.
  int64_t base = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (; base < plan.slices; base += warps * kWarp) {
    const int64_t own = base + lane * warps;
    const int32_t slice = own < plan.slices ? static_cast<int32_t>(own) : -1;
    const auto write = [&](int32_t s, double sum) {
      out[s] = static_cast<A>(sum);
      if (copy) copy[s] = static_cast<A>(sum);
    };
    bool is_long = false;
    if (slice >= 0 && (!pruned_only || is_pruned(work, slice))) {
      const int32_t t = plan.slice_tensor[slice], begin = plan.slice_start[slice];
      const int32_t entries = plan.slice_start[slice + 1] - begin;
      if (t >= work.first_tensor && t < work.first_tensor + work.tensors) {
        const Matrix& m = work.matrices[t];
        if (entries == 0 || m.tasks == 0 || !has(t)) {
          write(slice, 0);
        } else {
          const bool is_row = plan.slice_entry[begin] < plan.num_rows;
          is_long = static_cast<int64_t>(entries) * (is_row ? 1 : m.tasks) > kTermsPerLane;
          if (!is_long) write(slice, gather<Reduce, A>(work, m, slice, 0, 1));
        }
      }
    }
    for (uint32_t rest = __ballot_sync(~0u, is_long); rest; rest &= rest - 1) {
      const auto s = static_cast<int32_t>(base + (__ffs(static_cast<int>(rest)) - 1) * warps);
      double sum = gather<Reduce, A>(work, work.matrices[plan.slice_tensor[s]], s, lane, kWarp);
      for (int distance = kWarp / 2; distance > 0; distance /= 2)
        sum = Reduce::combine(sum, __shfl_xor_sync(~0u, sum, distance));
      if (lane == 0) write(s, sum);
    }
  }
}

}  // namespace ocsfast::cuda
