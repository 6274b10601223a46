// The walk: all tensors of one element type in one launch, one task a block at a time, every element
// loaded and stored once.
//
// A walk takes an Op, which says what happens to an element. It has
//   kOperands              how many tensors it takes an element of, the weight first
//   kRows                  how many rows a thread loads at a time
//   kWrites                a bit for each operand that is written
//   kPenalized             whether penalty<A>(work, slice), the SlicePenalty of a slice, means anything
//   kSparse                whether it changes only elements whose row or column is active
//   kSums, Reduce          whether it sums, and how two sums become one
//   kBlocksInFloat, kBlocksInHalf
//                          the blocks that are to be resident on an SM, by the size of its elements
//   kUnrollBand            whether rows of one band get a loop of their own, which takes more registers
//   walks(work, tensor)    whether it has anything to do in a tensor
//   body<T>(work, tensor)  the body of the loop for one tensor. It has
//     operand[kOperands]             the operands' memory; null: this tensor has none
//     change(packs, row, cols, terms)
//                                    changes a thread's elements of each operand; terms: what is summed
#pragma once

#include <cooperative_groups.h>

#include "sums.cuh"

namespace ocsfast::cuda {

// A block's shared memory.
template <class Op, class T, class A>
struct Shared {
  static constexpr int kColumnSlots = Op::kSums ? kThreads * kColumns<T, true> : 1;
  A cols[kColumnSlots];                                         // [rows of warps, columns of a tile]
  A rows[Op::kSums ? kRowSlots : 1];                            // [warps across, rows]
  SlicePenalty<A> row_penalty[Op::kPenalized ? kRowSlots : 1];  // [rows]
  // Each thread's own, read again for every row: a thread has no registers left for them.
  Pack<accumulator_t<T>, kColumns<T, true>> col_slopes[Op::kPenalized ? kThreads : 1];
};

// The SlicePenalty of each of a thread's columns.
template <class C, int kCount>
struct ColumnPenalties {
  uint32_t active;  // a bit for each column
  const C* slope;   // [kCount] in shared memory; null where the op is not kPenalized
};

// Eq. 8: the gradient with slope * weight in it. Where the slope is 0 it stays as it is, also beside an
// infinite weight.
template <class C>
__device__ C add_slope(C grad, C weight, C slope) {
  return slope != C(0) ? grad + weight * slope : grad;
}

// Eq. 9: a row's weights times the factor of the row and of each column that is active.
template <class C, int kCount>
__device__ void scale_pruned(C (&weights)[kCount], C factor, bool row_active, uint32_t active_cols) {
  const C alone = row_active ? factor : C(1), with_col = row_active ? factor * factor : factor;
#pragma unroll
  for (int k = 0; k < kCount; ++k) weights[k] *= active_cols >> k & 1 ? with_col : alone;
}

// What a thread has loaded of some rows and has yet to take through the body.
template <class Op, class T, int kRows, int kCount>
struct Loaded {
  Pack<T, kCount> pack[kRows][Op::kOperands];
  SlicePenalty<accumulator_t<T>> penalty[kRows];
  bool wanted[kRows];  // the row exists, and something in it is to be changed or summed
};

// Reads the penalties of a thread's columns; returns which are active, a bit each.
template <class Op, class T, class A, class Columns>
__device__ uint32_t read_column_penalties(const Work& work, const Op& op, const Matrix& m,
                                          const Tile& tile, const Columns& columns,
                                          Shared<Op, T, A>& shared) {
  auto& slopes = shared.col_slopes[threadIdx.x].word;
  uint32_t active = 0;
#pragma unroll
  for (int k = 0; k < Columns::kCount; ++k) {
    slopes[k] = 0;
    if (m.col_base < 0 || !columns.has(k)) continue;
    const auto c = static_cast<int32_t>(tile.first_col + columns.at(k)) / m.run;
    const SlicePenalty<A> penalty = op.template penalty<A>(work, work.plan.col_slice[m.col_base + c]);
    active |= static_cast<uint32_t>(penalty.active) << k;
    slopes[k] = static_cast<accumulator_t<T>>(penalty.slope);
  }
  return active;
}

// A thread's part of a tile, kRows rows at a time, `deep` rows apart.
template <class Op, class T, class A, class Body, class Columns>
struct ThreadRows {
  using C = accumulator_t<T>;
  using Reduce = typename Op::Reduce;
  static constexpr int kOperands = Op::kOperands, kCount = Columns::kCount;
  // Half as many rows of single elements: each element takes an address, and these take the registers.
  static constexpr int kRows = Columns::kIsPacked ? Op::kRows : std::max(1, Op::kRows / 2);
  using Rows = Loaded<Op, T, kRows, kCount>;

  const Body& body;
  const Columns& columns;
  const ColumnPenalties<C, kCount>& cols;
  const Shared<Op, T, A>& shared;
  int32_t rows, deep;                         // rows: 0 where the thread has no column
  uint32_t row_stride, band_stride, own_col;  // of elements

  // Rows `row`, `row` + deep, … of a band. What is not wanted is left unset: to keep what was in its
  // registers before would take a move of each.
  __device__ Rows load(int32_t row, uint32_t band) const {
    Rows to;
    const uint32_t offset = row * row_stride + band * band_stride + own_col;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int32_t own = row + u * deep;
      to.wanted[u] = own < rows;
      if constexpr (Op::kPenalized) {
        if (to.wanted[u]) {
          const SlicePenalty<A> penalty = shared.row_penalty[own];
          to.penalty[u] = {static_cast<C>(penalty.slope), penalty.active};
          if constexpr (Op::kSparse) to.wanted[u] = penalty.active || cols.active;
        }
      }
      if (!to.wanted[u]) continue;
#pragma unroll
      for (int i = 0; i < kOperands; ++i) {
        if (i == 0 || body.operand[i])
          columns.load(body.operand[i] + (offset + u * deep * row_stride), to.pack[u][i]);
      }
    }
    return to;
  }

  // Changes what was loaded from there, stores it, and adds to the sums. row_sums: [kRows].
  __device__ void compute(int32_t row, uint32_t band, Rows& from, C* row_sums,
                          C (&col_sums)[kCount]) const {
    const uint32_t offset = row * row_stride + band * band_stride + own_col;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (!from.wanted[u]) continue;
      SlicePenalty<C> row_penalty{};
      if constexpr (Op::kPenalized) row_penalty = from.penalty[u];
      C terms[kCount];
      body.change(from.pack[u], row_penalty, cols, terms);
#pragma unroll
      for (int i = 0; i < kOperands; ++i) {
        if ((Op::kWrites >> i & 1) && (i == 0 || body.operand[i])) {
          columns.store(body.operand[i] + (offset + u * deep * row_stride), from.pack[u][i],
                        Op::kSparse && !row_penalty.active ? cols.active : ~0u);
        }
      }
      if constexpr (Op::kSums) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          if (!Columns::kIsPacked && !columns.has(k)) terms[k] = 0;
          row_sums[u] = Reduce::combine(row_sums[u], terms[k]);
          col_sums[k] = Reduce::combine(col_sums[k], terms[k]);
        }
      }
    }
  }
};

// Takes a thread's elements of a tile through the body of the loop, band by band. The next ones are
// loaded before these are computed, so that memory has work meanwhile. Adds to col_sums, and to
// shared.rows if `with_rows`. kOneBand: rows have one band, which saves the loop over bands.
template <bool kOneBand, class Op, class T, class A, class C, class Body, class Columns>
__device__ void walk_rows(const Body& body, const Tile& tile, const Matrix& m,
                          const ThreadLayout& layout, const Columns& columns, bool with_rows,
                          const ColumnPenalties<C, Columns::kCount>& cols,
                          C (&col_sums)[Columns::kCount], Shared<Op, T, A>& shared) {
  using Part = ThreadRows<Op, T, A, Body, Columns>;
  // Rows whose sums are added over lanes together.
  constexpr int kRows = Part::kRows, kGroup = 2 * kRows;
  const int32_t deep = layout.deep();
  const uint32_t bands = kOneBand ? 1 : m.bands, band_stride = m.width;
  const Part part{body,
                  columns,
                  cols,
                  shared,
                  columns.has(0) ? tile.rows : 0,
                  deep,
                  bands * band_stride,
                  band_stride,
                  tile.first_col + columns.at(0)};
  auto next = part.load(layout.y(), 0);
  for (int32_t start = layout.y(); start - layout.y() < tile.rows; start += deep * kGroup) {
    C row_sums[kGroup] = {};
#pragma unroll
    for (int g = 0; g < kGroup; g += kRows) {
      const int32_t row = start + g * deep;
      for (uint32_t band = 0; band < bands; ++band) {
        auto now = next;
        const bool is_last = kOneBand || band + 1 == bands;
        next = part.load(is_last ? row + kRows * deep : row, is_last ? 0 : band + 1);
        part.compute(row, band, now, row_sums + g, col_sums);
        if (kOneBand) break;
      }
    }
    if constexpr (Op::kSums) {
      if (with_rows) add_row_sums<typename Op::Reduce>(layout, row_sums, start, tile.rows, shared.rows);
    }
  }
}

// Walks a tile. All threads of the block call it.
template <class Op, class T, class A, bool kPacked, class Body>
__device__ void walk_tile(const Work& work, const Op& op, const Body& body, const Matrix& m,
                          const Tile& tile, const ThreadLayout& layout, Shared<Op, T, A>& shared) {
  using C = accumulator_t<T>;
  const ThreadColumns<T, kPacked> columns(layout, tile.width - tile.first_col);
  ColumnPenalties<C, kColumns<T, kPacked>> cols{};
  bool any_active_col = false;
  if constexpr (Op::kPenalized) {
    cols = {read_column_penalties(work, op, m, tile, columns, shared),
            shared.col_slopes[threadIdx.x].word};
    if (m.col_base >= 0) any_active_col = __syncthreads_or(cols.active != 0);
  }
  if (Op::kSparse && !tile.any_active_row && !any_active_col) return;

  const bool with_cols = Op::kSums && m.col_base >= 0 && (!Op::kSparse || any_active_col);
  C col_sums[kColumns<T, kPacked>] = {};
  const auto rows = [&](auto one_band) {
    walk_rows<decltype(one_band)::value, Op, T>(body, tile, m, layout, columns, m.row_base >= 0, cols,
                                                col_sums, shared);
  };
  constexpr bool kUnroll = kPacked && Op::kUnrollBand;
  if (kUnroll && m.bands == 1) {
    rows(std::bool_constant<kUnroll>{});
  } else {
    rows(std::false_type{});
  }
  if constexpr (Op::kSums) {
    if (with_cols) {
      add_column_sums<typename Op::Reduce>(work, m, tile, layout, columns, col_sums, shared.cols);
    }
  }
}

// Reads the penalties of a tile's rows to shared memory. Returns whether any that the thread read is
// active.
template <class Op, class T, class A>
__device__ bool read_row_penalties(const Work& work, const Op& op, const Matrix& m, const Tile& tile,
                                   Shared<Op, T, A>& shared) {
  bool any_active = false;
  for (int32_t r = threadIdx.x; r < tile.rows; r += kThreads) {
    const int32_t slice = m.row_base < 0 ? -1 : work.plan.row_slice[m.row_base + tile.first_row + r];
    const SlicePenalty<A> penalty = op.template penalty<A>(work, slice);
    shared.row_penalty[r] = penalty;
    any_active |= penalty.active;
  }
  return any_active;
}

template <class Op, class T, class A, bool kPacked, class Body>
__device__ void walk_task(const Work& work, const Op& op, const Body& body, const Matrix& m,
                          const Task& task, Shared<Op, T, A>& shared) {
  Tile tile{task, task.first_row, 0, band_width(m, task.first_row), 0, false};
  const ThreadLayout layout(tile.width, kColumns<T, kPacked>);
  const bool with_rows = Op::kSums && m.row_base >= 0;
  for (; tile.first_row < task.last_row; tile.first_row += tile.rows) {
    const int warps_across = layout.warps_across();
    tile.rows = min(min(kRowSlots / warps_across, task.last_row - tile.first_row),
                    INT32_MAX / (m.bands * m.width));
    Body here = body;
    for (int i = 0; i < Op::kOperands; ++i) {
      if (here.operand[i]) here.operand[i] += static_cast<int64_t>(tile.first_row) * m.bands * m.width;
    }
    bool any_active = false;
    if constexpr (Op::kPenalized) any_active = read_row_penalties(work, op, m, tile, shared);
    if (with_rows) {
      for (int32_t i = threadIdx.x; i < tile.rows * warps_across; i += kThreads) shared.rows[i] = 0;
    }
    if constexpr (Op::kPenalized || Op::kSums) tile.any_active_row = __syncthreads_or(any_active);
    for (tile.first_col = 0; tile.first_col < static_cast<uint32_t>(tile.width);
         tile.first_col += layout.across() * kColumns<T, kPacked>) {
      walk_tile<Op, T, A, kPacked>(work, op, here, m, tile, layout, shared);
    }
    if constexpr (Op::kPenalized || Op::kSums) __syncthreads();
    if constexpr (Op::kSums) {
      if (!with_rows) continue;
      write_row_sums<typename Op::Reduce>(tile, layout, shared.rows,
                                          static_cast<A*>(work.row_sums) + m.row_base + tile.first_row);
      __syncthreads();
    }
  }
}

// Walks the tasks that can (kPacked) or cannot be loaded in packs. Returns whether others are left.
template <bool kPacked, class T, class A, class Op>
__device__ bool walk_as(const Work& work, const Op& op, Shared<Op, T, A>& shared) {
  bool others = false;
  for (int32_t i = blockIdx.x; i < work.num_tasks; i += gridDim.x) {
    const Task task = work.tasks[work.first_task + i];
    const Matrix m = work.matrices[task.tensor];
    if (m.dtype != kDType<T> || !op.walks(work, task.tensor)) continue;
    const auto body = op.template body<T>(work, task.tensor);
    bool packed = band_width(m, task.first_row) % kColumns<T, true> == 0;
    for (int s = 0; s < Op::kOperands; ++s)
      packed &= reinterpret_cast<uintptr_t>(body.operand[s]) % kPackBytes == 0;
    if (packed == kPacked) {
      walk_task<Op, T, A, kPacked>(work, op, body, m, task, shared);
    } else {
      others = true;
    }
  }
  return others;
}

// Takes all elements of the launch's tensors of type T through an Op. The whole grid calls it; the sums
// may be gathered after the grid's next barrier. Tasks in packs and others have a loop each, because one
// loop for both would need the registers of the larger everywhere.
template <class T, class A, class Op>
__device__ void walk(const Work& work, const Op& op, Shared<Op, T, A>& shared) {
  static_assert(sizeof(shared) <= 48 * 1024, "more is not given to a kernel that does not ask for it");
  if (walk_as<true>(work, op, shared)) walk_as<false>(work, op, shared);
}

}  // namespace ocsfast::cuda
