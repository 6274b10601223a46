// The walk: all tensors in one launch, one task a block at a time, every element loaded and stored once.
//
// A walk takes an Op, which says what happens to an element. It has
//   kOperands              how many tensors it takes an element of, the weight first
//   kUnroll                how many rows a thread has in flight
//   kWrites                a bit for each operand that is written
//   kPenalized             whether penalty<A>(work, slice), the SlicePenalty of a slice, means anything
//   kSparse                whether it changes only elements whose row or column is active
//   kSums, Reduce          whether it sums, and how two sums become one
//   walks(work, tensor)    whether it has anything to do in a tensor
//   body<T>(work, tensor)  the body of the loop for one tensor. It has
//     operand[kOperands]             the operands' memory; null: this tensor has none
//     change(element, row, column)   changes an element of each operand; returns what is summed
#pragma once

#include <cooperative_groups.h>

#include "sums.cuh"

namespace ocsfast::cuda {

// A block's shared memory.
template <class A>
struct Shared {
  A cols[kThreads * kColumns<__half, true>];  // [rows of warps, columns of a tile]
  A rows[kRowSlots];                          // [warps across, rows]
  A slope[kRowSlots];                         // [rows] SlicePenalty of each row
  bool active[kRowSlots];
};

// The SlicePenalty of each of a thread's columns.
template <class C, int kCount>
struct ColumnPenalties {
  uint32_t active;  // a bit for each column
  C slope[kCount];
};

template <class A, class Op, class C, class Columns>
__device__ void read_column_penalties(const Work& work, const Op& op, const Matrix& m, const Tile& tile,
                                      const Columns& columns,
                                      ColumnPenalties<C, Columns::kCount>& penalties) {
#pragma unroll
  for (int k = 0; k < Columns::kCount; ++k) {
    if (!columns.has(k)) continue;
    const auto c = static_cast<int32_t>(tile.first_col + columns.at(k)) / m.run;
    const SlicePenalty<A> penalty = op.template penalty<A>(work, work.plan.col_slice[m.col_base + c]);
    penalties.active |= static_cast<uint32_t>(penalty.active) << k;
    penalties.slope[k] = static_cast<C>(penalty.slope);
  }
}

// Changes a thread's elements of one row and adds them to its sums. v[operands][columns].
template <class Op, class T, class C, class Body, class Columns>
__device__ void change_elements(const Body& body, const Columns& columns,
                                T (&v)[Op::kOperands][Columns::kCount], const SlicePenalty<C>& row,
                                const ColumnPenalties<C, Columns::kCount>& cols, C& row_sum,
                                C (&col_sums)[Columns::kCount]) {
  using Reduce = typename Op::Reduce;
#pragma unroll
  for (int k = 0; k < Columns::kCount; ++k) {
    const bool active = cols.active >> k & 1;
    if (!columns.has(k) || (Op::kSparse && !active && !row.active)) continue;
    T element[Op::kOperands];
#pragma unroll
    for (int i = 0; i < Op::kOperands; ++i) element[i] = v[i][k];
    const C term = body.change(element, row, SlicePenalty<C>{active, cols.slope[k]});
#pragma unroll
    for (int i = 0; i < Op::kOperands; ++i) v[i][k] = element[i];
    row_sum = Reduce::combine(row_sum, term);
    col_sums[k] = Reduce::combine(col_sums[k], term);
  }
}

// Takes a thread's elements of a tile through the body of the loop: kUnroll rows at a time, band by
// band. Adds to col_sums, and to shared.rows if `with_rows`.
template <class Op, class T, class A, class C, class Body, class Columns>
__device__ void walk_rows(const Body& body, const Tile& tile, const Matrix& m,
                          const ThreadLayout& layout, const Columns& columns, bool penalized,
                          bool with_rows, const ColumnPenalties<C, Columns::kCount>& cols,
                          C (&col_sums)[Columns::kCount], Shared<A>& shared) {
  using Reduce = typename Op::Reduce;
  constexpr int kOperands = Op::kOperands, kCount = Columns::kCount;
  // Half as many rows of single elements: each element takes an address, and these take the registers.
  constexpr int kUnroll = Columns::kIsPacked ? Op::kUnroll : std::max(1, Op::kUnroll / 2);
  const int32_t rows = tile.rows, deep = layout.deep();
  const uint32_t bands = m.bands, band_stride = m.width, row_stride = bands * band_stride;
  for (int32_t start = 0; start < rows; start += deep * kUnroll) {
    const int32_t row = start + layout.y();
    C row_sums[kUnroll] = {};
    const auto touched = [&](int u) {
      const int32_t own = row + u * deep;
      return own < rows && (!Op::kSparse || shared.active[own] || cols.active);
    };
    uint32_t offset = row * row_stride + tile.first_col;
    for (uint32_t band = 0; band < bands; ++band, offset += band_stride) {
      T v[kUnroll][kOperands][kCount];
      const auto place = [&](int u, int i) {
        return body.operand[i] + (offset + u * deep * row_stride);
      };
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {  // all loads first, so that they are in flight together
        if (!touched(u)) continue;
#pragma unroll
        for (int i = 0; i < kOperands; ++i) {
          if (body.operand[i]) columns.load(place(u, i), v[u][i]);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (!touched(u)) continue;
        SlicePenalty<C> row_penalty{};
        if (penalized) {
          const int32_t own = row + u * deep;
          row_penalty = {shared.active[own], static_cast<C>(shared.slope[own])};
        }
        change_elements<Op>(body, columns, v[u], row_penalty, cols, row_sums[u], col_sums);
#pragma unroll
        for (int i = 0; i < kOperands; ++i) {
          if ((Op::kWrites >> i & 1) && body.operand[i]) {
            columns.store(place(u, i), v[u][i], Op::kSparse && !row_penalty.active ? cols.active : ~0u);
          }
        }
      }
    }
    if constexpr (Op::kSums) {
      if (with_rows) add_row_sums<Reduce>(layout, row_sums, row, rows, shared.rows);
    }
  }
}

// Walks a tile. All threads of the block call it.
template <class Op, class T, class A, bool kPacked, class Body>
__device__ void walk_tile(const Work& work, const Op& op, const Body& body, const Tile& tile,
                          const ThreadLayout& layout, Shared<A>& shared) {
  using C = accumulator_t<T>;
  using Reduce = typename Op::Reduce;
  const Matrix& m = work.matrices[tile.task.tensor];
  const ThreadColumns<T, kPacked> columns(layout, tile.width - tile.first_col);
  const bool penalized = Op::kPenalized && work.mask;
  ColumnPenalties<C, kColumns<T, kPacked>> cols{};
  bool any_active_col = false;
  if (penalized && m.col_base >= 0) {
    read_column_penalties<A>(work, op, m, tile, columns, cols);
    any_active_col = __syncthreads_or(cols.active != 0);
  }
  if (Op::kSparse && !tile.any_active_row && !any_active_col) return;

  const bool sums = Op::kSums && (!Op::kPenalized || penalized);
  const bool with_rows = sums && m.row_base >= 0;
  const bool with_cols = sums && m.col_base >= 0 && (!Op::kSparse || any_active_col);
  C col_sums[kColumns<T, kPacked>] = {};
  walk_rows<Op, T>(body, tile, m, layout, columns, penalized, with_rows, cols, col_sums, shared);
  if constexpr (Op::kSums) {
    if (with_cols) add_column_sums<Reduce>(work, tile, layout, columns, col_sums, shared.cols);
  }
}

// Reads the penalties of a tile's rows to shared memory. Returns whether any that the thread read is
// active.
template <class Op, class A>
__device__ bool read_row_penalties(const Work& work, const Op& op, const Matrix& m, const Tile& tile,
                                   Shared<A>& shared) {
  bool any_active = false;
  for (int32_t r = threadIdx.x; r < tile.rows; r += kThreads) {
    const int32_t slice = m.row_base < 0 ? -1 : work.plan.row_slice[m.row_base + tile.first_row + r];
    const SlicePenalty<A> penalty = op.template penalty<A>(work, slice);
    shared.active[r] = penalty.active;
    shared.slope[r] = penalty.slope;
    any_active |= penalty.active;
  }
  return any_active;
}

template <class Op, class T, class A, bool kPacked, class Body>
__device__ void walk_task(const Work& work, const Op& op, const Body& body, const Task& task,
                          Shared<A>& shared) {
  const Matrix& m = work.matrices[task.tensor];
  Tile tile{task, task.first_row, 0, band_width(m, task.first_row), 0, false};
  const ThreadLayout layout(tile.width, kColumns<T, kPacked>);
  const bool penalized = Op::kPenalized && work.mask;
  const bool with_rows = Op::kSums && (!Op::kPenalized || penalized) && m.row_base >= 0;
  for (; tile.first_row < task.last_row; tile.first_row += tile.rows) {
    const int warps_across = layout.warps_across();
    tile.rows = min(min(kRowSlots / warps_across, task.last_row - tile.first_row),
                    INT32_MAX / (m.bands * m.width));
    Body here = body;
    for (int i = 0; i < Op::kOperands; ++i) {
      if (here.operand[i]) here.operand[i] += static_cast<int64_t>(tile.first_row) * m.bands * m.width;
    }
    bool any_active = false;
    if (penalized) any_active = read_row_penalties(work, op, m, tile, shared);
    if (with_rows) {
      for (int32_t i = threadIdx.x; i < tile.rows * warps_across; i += kThreads) shared.rows[i] = 0;
    }
    tile.any_active_row = __syncthreads_or(any_active);
    for (tile.first_col = 0; tile.first_col < static_cast<uint32_t>(tile.width);
         tile.first_col += layout.across() * kColumns<T, kPacked>) {
      walk_tile<Op, T, A, kPacked>(work, op, here, tile, layout, shared);
    }
    __syncthreads();
    if (!with_rows) continue;
    write_row_sums<typename Op::Reduce>(tile, layout, shared.rows,
                                        static_cast<A*>(work.row_sums) + m.row_base + tile.first_row);
    __syncthreads();
  }
}

// Walks the tasks of one element type that can (kPacked) or cannot be loaded in packs.
template <class T, bool kPacked, class A, class Op>
__device__ void walk_as(const Work& work, const Op& op, Shared<A>& shared) {
  for (int32_t i = blockIdx.x; i < work.tasks; i += gridDim.x) {
    const Task task = find_task(work.matrices, work.plan.tensors, work.first_task + i);
    const Matrix& m = work.matrices[task.tensor];
    if (m.dtype != kDType<T> || !op.walks(work, task.tensor)) continue;
    const auto body = op.template body<T>(work, task.tensor);
    bool packed = band_width(m, task.first_row) % kColumns<T, true> == 0;
    for (int s = 0; s < Op::kOperands; ++s)
      packed &= reinterpret_cast<uintptr_t>(body.operand[s]) % kPackBytes == 0;
    if (packed == kPacked) walk_task<Op, T, A, kPacked>(work, op, body, task, shared);
  }
}

// Takes all elements of the launch's tensors through an Op. The whole grid calls it; the sums may be
// gathered after the grid's next barrier. Each element type, packed or not, has a loop of its own,
// because one loop for all would need the registers of the largest everywhere.
template <class A, class Op>
__device__ void walk(const Work& work, const Op& op, Shared<A>& shared) {
  walk_as<float, true>(work, op, shared);
  walk_as<float, false>(work, op, shared);
  if (!work.any_non_float) return;
  walk_as<__half, true>(work, op, shared);
  walk_as<__half, false>(work, op, shared);
  walk_as<__nv_bfloat16, true>(work, op, shared);
  walk_as<__nv_bfloat16, false>(work, op, shared);
  if constexpr (std::is_same_v<A, double>) {
    walk_as<double, true>(work, op, shared);
    walk_as<double, false>(work, op, shared);
  }
}

}  // namespace ocsfast::cuda
