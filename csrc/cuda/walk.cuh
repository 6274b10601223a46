// How the CUDA kernels walk the weights of a plan: all tensors in one launch, a block a task, each
// element in and out once; what it adds to its row and to its column goes to scratch memory, and after a
// barrier of the grid a slice gathers its sum from there, in an order that depends on the plan alone.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../matrix.h"
#include "../plan.h"

namespace ocsfast::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// Blocks of a processor that its registers must suffice for: 64 a thread hold a float's innermost loop
// without spilling, and 32 warps with three or four loads of 16 bytes each are what the memory can take.
// In double half.
template <class A>
constexpr int kBlocksPerProcessor = std::is_same_v<A, double> ? 2 : 4;
// Columns a thread owns: as many as the widest load there is, or, one by one, as many loads as registers
// allow.
constexpr int kPackBytes = 16;
constexpr int kMostSingles = 4;
template <class T, bool kPacked>
constexpr int kColumns =
    kPackBytes / sizeof(T) < kMostSingles || kPacked ? kPackBytes / sizeof(T) : kMostSingles;
// Row sums a block keeps, one for each warp that takes part in a row: 4 KB. A task with more is cut.
constexpr int kRowSlots = 1024;
// Sums that a lane adds up alone; what takes more is shared by a warp.
constexpr int kTermsPerLane = 16;

// What every kernel over the weights is given.
struct Work {
  Plan plan;
  const Matrix* matrices;  // [plan.tensors] on the device
  void* row_sums;          // [num_rows] accumulators
  void* partials;          // [partials] accumulators, a task's column sums
  void* slice_sq;          // [slices] accumulators
  const bool* mask;        // [groups] to prune; null: none is
  // The launch's tensors are first_tensor .. first_tensor + tensors - 1.
  int32_t first_tensor, tensors, first_task, tasks;
  bool others_than_float;  // are among them
  bool last;               // no launch for further tensors follows
};

// Tensors beside the weights move, so their pointers go by value, and all arguments of a kernel together
// may have so many bytes: so many tensors a launch takes, at most, of ops with two pointers for each.
constexpr int kArgumentBytes = 32764;
#ifdef OCSFAST_MOST_TENSORS  // so few, in tests, that a small plan takes several launches
constexpr int kMostTensors = OCSFAST_MOST_TENSORS;
#else
constexpr int kMostTensors = 1984;
#endif

template <int kTensors = kMostTensors>
struct Beside {
  void* pointer[kTensors];  // of the launch's tensors; null: none
  __device__ void* operator()(const Work& work, int32_t tensor) const {
    return pointer[tensor - work.first_tensor];
  }
};

// What slices that contain an element have to say to it: whether Eq. 8 or 9 changes it, and by which
// slope Eq. 8 does.
template <class A>
struct Label {
  bool counts;
  A slope;
};

struct Add {
  template <class V>
  static __device__ V join(V a, V b) {
    return a + b;
  }
};
struct Largest {
  template <class V>
  static __device__ V join(V a, V b) {
    return a > b || a != a ? a : b;  // NaN wins
  }
};

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
constexpr DType dtype_of() {
  return std::is_same_v<T, float>    ? DType::kFloat
         : std::is_same_v<T, double> ? DType::kDouble
         : std::is_same_v<T, __half> ? DType::kHalf
                                     : DType::kBFloat16;
}

// The compiler cannot know of an address read from memory that it is global, and would be prepared for
// shared memory too.
template <class T>
__device__ T* weight_of(const Work& work, int32_t tensor) {
  void* const weight = work.matrices[tensor].weight;
  __builtin_assume(__isGlobal(weight));
  return static_cast<T*>(weight);
}

__device__ inline bool is_pruned(const Work& work, int32_t slice) {
  return slice >= 0 && work.mask[work.plan.slice_group[slice]];
}

// Eq. 8's label of a pruned slice: strength / |slice|, or 0 where the norm is.
template <class A>
__device__ A slope_of(const Work& work, int32_t slice, A strength) {
  const A square = static_cast<const A*>(work.slice_sq)[slice];
  return square != A(0) ? strength / sqrt(square) : A(0);
}

template <class A>
struct Shared {
  A cols[kThreads * kColumns<__half, true>];  // [rows of warps, columns of a tile]
  A rows[kRowSlots];                          // [warps across, rows]
  A slope[kRowSlots];
  bool counts[kRowSlots];
};

// How the threads of a block lie over a task: 2 ** log_across of them side by side along a band, the
// rest over rows.
struct Layout {
  int log_across;

  __device__ Layout(int32_t width, int columns) : log_across(0) {
    while (across() < kThreads && across() * columns < width) ++log_across;
  }
  __device__ int across() const { return 1 << log_across; }
  __device__ int deep() const { return kThreads >> log_across; }
  __device__ int x() const { return static_cast<int>(threadIdx.x) & (across() - 1); }
  __device__ int y() const { return static_cast<int>(threadIdx.x) >> log_across; }
  // Warps that share a row.
  __device__ int warps_across() const { return max(1, across() / kWarp); }
};

// A thread's elements of one band: a pack of neighbours, or, where bands do not start at multiples of a
// pack, a few that lie `step` from one another.
template <class T, bool kPacked>
struct Lane {
  static constexpr int kCount = kColumns<T, kPacked>;
  int first, step;
  uint32_t left;  // columns that exist, from the tile's first one on

  __device__ Lane(const Layout& layout, uint32_t columns)
      : first(kPacked ? layout.x() * kCount : layout.x()),
        step(kPacked ? 1 : layout.across()),
        left(columns) {}
  __device__ uint32_t at(int k) const { return first + k * step; }
  __device__ bool has(int k) const { return at(kPacked ? 0 : k) < left; }

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
  // Of single elements, those in `wanted`.
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

// A piece of a task: some rows of it and, within their bands, the columns from `tile` on. Its elements
// lie in 32 bits of one another.
struct Piece {
  Task task;
  int32_t first, rows, width;
  uint32_t tile;
  bool any_row;  // counts
};

// Column sums of a piece, out of its threads' own.
template <class Join, class A, class C, class L>
__device__ void sum_columns(const Work& work, const Piece& piece, const Layout& layout, const L& lane,
                            C (&col)[L::kCount], Shared<A>& shared) {
  // Over threads of a warp that have the same columns, then over warps and over each column's run.
  for (int distance = kWarp / 2; distance >= layout.across(); distance /= 2) {
#pragma unroll
    for (int k = 0; k < L::kCount; ++k)
      col[k] = Join::join(col[k], __shfl_xor_sync(~0u, col[k], distance));
  }
  const uint32_t columns = layout.across() * L::kCount;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp / layout.warps_across();
  if (static_cast<int>(threadIdx.x) % kWarp < layout.across()) {
#pragma unroll
    for (int k = 0; k < L::kCount; ++k)
      shared.cols[warp_row * columns + lane.at(k)] = static_cast<A>(col[k]);
  }
  __syncthreads();
  const Matrix& m = work.matrices[piece.task.tensor];
  const int64_t begin = piece.tile, end = min(piece.tile + columns, static_cast<uint32_t>(piece.width));
  A* partial = static_cast<A*>(work.partials) + m.first_partial +
               static_cast<int64_t>(piece.task.number) * m.cols;
  for (int64_t c = begin / m.run + threadIdx.x; c * m.run < end; c += kThreads) {
    const bool goes_on = c * m.run < begin || piece.first > piece.task.first_row;
    double sum = goes_on ? static_cast<double>(partial[c]) : 0.0;
    for (int64_t j = max(c * m.run, begin); j < min((c + 1) * m.run, end); ++j) {
      for (int k = 0; k < kWarps / layout.warps_across(); ++k)
        sum = Join::join(sum, static_cast<double>(shared.cols[k * columns + (j - begin)]));
    }
    partial[c] = static_cast<A>(sum);
  }
  __syncthreads();
}

// What an Op is: see `walk`.
template <class Op, class T, class A, bool kPacked, class Step>
__device__ void walk_piece(const Work& work, const Op& op, const Step& step, const Piece& piece,
                           const Layout& layout, Shared<A>& shared) {
  using C = accumulator_t<T>;
  using Join = typename Op::Join;
  constexpr int kStreams = Op::kStreams, kCount = kColumns<T, kPacked>;
  // Single elements have an address each.
  constexpr int kUnroll = kPacked ? Op::kUnroll : std::max(1, Op::kUnroll / 2);
  const Matrix& m = work.matrices[piece.task.tensor];
  const Lane<T, kPacked> lane(layout, piece.width - piece.tile);
  const bool penalized = Op::kPenalized && work.mask;
  uint32_t col_counts = 0;
  C slope[kCount] = {};
  bool any_col = false;
  if (penalized && m.col_base >= 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (!lane.has(k)) continue;
      const auto c = static_cast<int32_t>(piece.tile + lane.at(k)) / m.run;
      const Label<A> label = op.template label<A>(work, work.plan.col_slice[m.col_base + c]);
      col_counts |= static_cast<uint32_t>(label.counts) << k;
      slope[k] = static_cast<C>(label.slope);
    }
    any_col = __syncthreads_or(col_counts != 0);
  }
  if (Op::kSparse && !piece.any_row && !any_col) return;

  const bool sums = Op::kSums && (!Op::kPenalized || penalized);
  const bool with_rows = sums && m.row_base >= 0;
  const bool with_cols = sums && m.col_base >= 0 && (!Op::kSparse || any_col);
  const int32_t rows = piece.rows, deep = layout.deep();
  const uint32_t bands = m.bands, band_stride = m.width, row_stride = bands * band_stride;
  C col[kCount] = {};
  for (int32_t start = 0; start < rows; start += deep * kUnroll) {
    const int32_t r = start + layout.y();
    C row[kUnroll] = {};
    const auto touched = [&](int u) {
      const int32_t own = r + u * deep;
      return own < rows && (!Op::kSparse || shared.counts[own] || col_counts);
    };
    uint32_t offset = r * row_stride + piece.tile;
    for (uint32_t band = 0; band < bands; ++band, offset += band_stride) {
      T v[kUnroll][kStreams][kCount];
      const auto place = [&](int u, int i) { return step.stream[i] + (offset + u * deep * row_stride); };
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (!touched(u)) continue;
#pragma unroll
        for (int i = 0; i < kStreams; ++i) {
          if (step.stream[i]) lane.load(place(u, i), v[u][i]);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (!touched(u)) continue;
        Label<C> row_label{};
        if (penalized) {
          const int32_t own = r + u * deep;
          row_label = {shared.counts[own], static_cast<C>(shared.slope[own])};
        }
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const bool counts = col_counts >> k & 1;
          if (!lane.has(k) || (Op::kSparse && !counts && !row_label.counts)) continue;
          T element[kStreams];
#pragma unroll
          for (int i = 0; i < kStreams; ++i) element[i] = v[u][i][k];
          const C term = step.change(element, row_label, Label<C>{counts, slope[k]});
#pragma unroll
          for (int i = 0; i < kStreams; ++i) v[u][i][k] = element[i];
          row[u] = Join::join(row[u], term);
          col[k] = Join::join(col[k], term);
        }
#pragma unroll
        for (int i = 0; i < kStreams; ++i) {
          if ((Op::kWrites >> i & 1) && step.stream[i]) {
            lane.store(place(u, i), v[u][i], Op::kSparse && !row_label.counts ? col_counts : ~0u);
          }
        }
      }
    }
    if constexpr (Op::kSums) {
      if (!with_rows) continue;
      for (int distance = min(layout.across(), kWarp) / 2; distance > 0; distance /= 2) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          row[u] = Join::join(row[u], __shfl_xor_sync(~0u, row[u], distance));
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t own = r + u * deep;
        if (own < rows && layout.x() % kWarp == 0) {
          A& sum = shared.rows[layout.x() / kWarp * rows + own];  // of this thread alone
          sum = Join::join(sum, static_cast<A>(row[u]));
        }
      }
    }
  }
  if constexpr (Op::kSums) {
    if (with_cols) sum_columns<Join>(work, piece, layout, lane, col, shared);
  }
}

template <class Op, class T, class A, bool kPacked, class Step>
__device__ void walk_task(const Work& work, const Op& op, const Step& step, const Task& task,
                          Shared<A>& shared) {
  using Join = typename Op::Join;
  const Matrix& m = work.matrices[task.tensor];
  Piece piece{task, task.first_row, 0, band_width(m, task.first_row), 0, false};
  const Layout layout(piece.width, kColumns<T, kPacked>);
  const bool penalized = Op::kPenalized && work.mask;
  const bool with_rows = Op::kSums && (!Op::kPenalized || penalized) && m.row_base >= 0;
  for (; piece.first < task.last_row; piece.first += piece.rows) {
    const int warps_across = layout.warps_across();
    piece.rows =
        min(min(kRowSlots / warps_across, task.last_row - piece.first), INT32_MAX / (m.bands * m.width));
    Step here = step;
    for (int i = 0; i < Op::kStreams; ++i) {
      if (here.stream[i]) here.stream[i] += static_cast<int64_t>(piece.first) * m.bands * m.width;
    }
    bool any_row = false;
    if (penalized) {
      for (int32_t r = threadIdx.x; r < piece.rows; r += kThreads) {
        const int32_t slice = m.row_base < 0 ? -1 : work.plan.row_slice[m.row_base + piece.first + r];
        const Label<A> label = op.template label<A>(work, slice);
        shared.counts[r] = label.counts;
        shared.slope[r] = label.slope;
        any_row |= label.counts;
      }
    }
    if (with_rows) {
      for (int32_t i = threadIdx.x; i < piece.rows * warps_across; i += kThreads) shared.rows[i] = 0;
    }
    piece.any_row = __syncthreads_or(any_row);
    for (piece.tile = 0; piece.tile < static_cast<uint32_t>(piece.width);
         piece.tile += layout.across() * kColumns<T, kPacked>) {
      walk_piece<Op, T, A, kPacked>(work, op, here, piece, layout, shared);
    }
    __syncthreads();
    if (!with_rows) continue;
    A* row_sums = static_cast<A*>(work.row_sums) + m.row_base + piece.first;
    for (int32_t r = threadIdx.x; r < piece.rows; r += kThreads) {
      double sum = 0;
      for (int k = 0; k < warps_across; ++k)
        sum = Join::join(sum, static_cast<double>(shared.rows[k * piece.rows + r]));
      row_sums[r] = static_cast<A>(sum);
    }
    __syncthreads();
  }
}

// The tasks of one kind, block by block.
template <class T, bool kPacked, class A, class Op>
__device__ void walk_as(const Work& work, const Op& op, Shared<A>& shared) {
  for (int32_t i = blockIdx.x; i < work.tasks; i += gridDim.x) {
    const Task task = find_task(work.matrices, work.plan.tensors, work.first_task + i);
    const Matrix& m = work.matrices[task.tensor];
    if (m.dtype != dtype_of<T>() || !op.walks(work, task.tensor)) continue;
    const auto step = op.template start<T>(work, task.tensor);
    bool packed = band_width(m, task.first_row) % kColumns<T, true> == 0;
    for (int s = 0; s < Op::kStreams; ++s)
      packed &= reinterpret_cast<uintptr_t>(step.stream[s]) % kPackBytes == 0;
    if (packed == kPacked) walk_task<Op, T, A, kPacked>(work, op, step, task, shared);
  }
}

// Takes all elements of the launch's tensors through an Op. It has
//   kStreams, kUnroll: tensors that go through side by side, the weight first; rows of them in flight
//   kWrites: bits of the streams that are written
//   kPenalized: it labels slices, label<A>(work, slice); kSparse: it touches only elements that count
//   kSums, Join: it sums, and how
//   walks(work, tensor)
//   start<T>(work, tensor): for one tensor, the streams (null: none), and
//     change(element, row_label, column_label), which changes an element of each stream and returns what
//     is summed.
// A whole grid calls it; the sums may be gathered after the grid's next barrier. Each kind of element
// has a loop, and with it the registers, to itself.
template <class A, class Op>
__device__ void walk(const Work& work, const Op& op, Shared<A>& shared) {
  walk_as<float, true>(work, op, shared);
  walk_as<float, false>(work, op, shared);
  if (!work.others_than_float) return;
  walk_as<__half, true>(work, op, shared);
  walk_as<__half, false>(work, op, shared);
  walk_as<__nv_bfloat16, true>(work, op, shared);
  walk_as<__nv_bfloat16, false>(work, op, shared);
  if constexpr (std::is_same_v<A, double>) {
    walk_as<double, true>(work, op, shared);
    walk_as<double, false>(work, op, shared);
  }
}

// Every step-th of a slice's sums, from `number` on.
template <class Join, class A>
__device__ double gather(const Work& work, const Matrix& m, int32_t slice, int32_t number, int step) {
  const Plan& plan = work.plan;
  const A* row_sums = static_cast<const A*>(work.row_sums);
  const A* partials = static_cast<const A*>(work.partials) + m.first_partial;
  const int32_t end = plan.slice_start[slice + 1];
  double sum = 0;
  for (int32_t k = plan.slice_start[slice]; k < end; ++k) {
    const int32_t entry = plan.slice_entry[k];
    const bool is_row = entry < plan.num_rows;
    const int32_t terms = is_row ? 1 : m.tasks;
    const A* of = is_row ? row_sums + entry : partials + (entry - plan.num_rows - m.col_base);
    for (; number < terms; number += step)
      sum = Join::join(sum, static_cast<double>(of[static_cast<int64_t>(number) * m.cols]));
    number -= terms;
  }
  return sum;
}

// The sums of all slices of the launch's tensors, or of those that are pruned, to out and, unless it is
// null, also to copy. Where has(tensor) is false they are 0. A whole grid calls it.
template <class Join, class A, class Has>
__device__ void gather_slices(const Work& work, bool pruned_only, const Has& has, A* out, A* copy) {
  const Plan& plan = work.plan;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  // Neighbours go to different warps: they are likely to be long together.
  int64_t base = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (; base < plan.slices; base += warps * kWarp) {
    const int64_t wide = base + lane * warps;
    const int32_t slice = wide < plan.slices ? static_cast<int32_t>(wide) : -1;
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
          if (!is_long) write(slice, gather<Join, A>(work, m, slice, 0, 1));
        }
      }
    }
    for (uint32_t rest = __ballot_sync(~0u, is_long); rest; rest &= rest - 1) {
      const auto s = static_cast<int32_t>(base + (__ffs(static_cast<int>(rest)) - 1) * warps);
      double sum = gather<Join, A>(work, work.matrices[plan.slice_tensor[s]], s, lane, kWarp);
      for (int distance = kWarp / 2; distance > 0; distance /= 2)
        sum = Join::join(sum, __shfl_xor_sync(~0u, sum, distance));
      if (lane == 0) write(s, sum);
    }
  }
}

}  // namespace ocsfast::cuda
