// What the CUDA kernels share: the work of a call as one kernel argument, elements as numbers, and the
// slices' sums of squares.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>
#include "../plan.h"
#include "../work.h"

namespace ocsfast::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// Columns a lane holds at once: eight loads of a row in flight hide most of the memory's latency.
constexpr int kColumnsPerLane = 8;
constexpr int kTile = kWarp * kColumnsPerLane;
// Blocks of a processor that its registers must suffice for: 64 a thread hold all that without spilling,
// and 32 warps with eight loads each are what the memory can take.
constexpr int kBlocksPerProcessor = 4;
static_assert(kTile == kThreads);  // a thread adds up one column of a tile over the warps
// Squares a lane adds up in one column before the sum goes on in double: 128 additions lose less than
// rounding the result to float does.
constexpr int kBandsPerFold = 128;

// Tensors a launch takes. Gradients move, so pointers go by value; an argument may have 32764 bytes.
constexpr int kMaxTensors = 448;

struct Work {
  Plan plan;
  const bool* mask;      // [groups]; null: all slices count
  const float* scalar;   // 0-dim: Eq. 9's factor or Eq. 8's strength
  void* row_sq;          // [num_rows] accumulators
  void* partial;         // [partials] accumulators, a task's column sums
  void* slice_sq;        // [slices] accumulators
  int32_t first_tensor;  // the launch's tensors are first_tensor .. first_tensor + tensors - 1
  int32_t tensors;
  int32_t first_task, tasks;
  bool with_grad_only;  // leave out tensors without a gradient
  bool last;            // no launch for further tensors follows
  Matrix matrix[kMaxTensors];
};
static_assert(sizeof(Work) <= 32764);

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

template <class A>
__device__ A to_number(float v) {
  return v;
}
template <class A>
__device__ A to_number(double v) {
  return static_cast<A>(v);
}
template <class A>
__device__ A to_number(__half v) {
  return __half2float(v);
}
template <class A>
__device__ A to_number(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

template <class T>
__device__ T from_number(double v) {
  return static_cast<T>(v);
}
template <class T>
__device__ T from_number(float v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return v;
  }
}

// Calls f with a null pointer of the matrix's element type.
template <class F>
__device__ void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(static_cast<float*>(nullptr));
    case DType::kDouble:
      return f(static_cast<double*>(nullptr));
    case DType::kHalf:
      return f(static_cast<__half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
  }
}

struct Task {
  int32_t tensor;  // in work.matrix
  int32_t number;  // among the tensor's tasks
  int32_t first_row, last_row;
};

__device__ inline Task find_task(const Work& work, int32_t task) {
  int32_t low = 0, high = work.tensors - 1;
  while (low < high) {  // the last tensor whose first task is not after this one; empty ones have none
    const int32_t middle = (low + high + 1) / 2;
    if (work.matrix[middle].first_task <= task) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Matrix& m = work.matrix[low];
  const int32_t number = task - m.first_task;
  const int32_t first = number * m.rows_per_task;
  return {low, number, first, first + min(m.rows_per_task, m.rows - first)};
}

__device__ inline bool slice_pruned(const Work& work, int32_t slice) {
  return slice >= 0 && (!work.mask || work.mask[work.plan.slice_group[slice]]);
}

__device__ inline bool row_pruned(const Work& work, const Matrix& m, int32_t row) {
  return m.row_base >= 0 && slice_pruned(work, work.plan.row_slice[m.row_base + row]);
}

// Whether any column of the tensor lies in a pruned slice. All threads of a block call it.
__device__ inline bool any_col_pruned(const Work& work, const Matrix& m) {
  bool any = false;
  if (m.col_base >= 0) {
    for (int32_t c = threadIdx.x; c < m.cols && !any; c += kThreads) {
      any = slice_pruned(work, work.plan.col_slice[m.col_base + c]);
    }
  }
  return __syncthreads_or(any);
}

// Elements of a row a lane reads before it writes the first of them: their reads wait for the memory
// together.
constexpr int kBatch = 4;

// Calls change(of_row(row), {of_column(j), ...}, position, count) for all elements of a task: for the
// `count` ones at position, position + kWarp, ... in the tensor, in columns j, j + kWarp, ... of a row.
template <class OfRow, class OfColumn, class Change>
__device__ void for_each_batch(const Matrix& m, const Task& task, const OfRow& of_row,
                               const OfColumn& of_column, const Change& change) {
  using Column = decltype(of_column(0u));
  const int64_t row_elements = static_cast<int64_t>(m.bands) * m.width;
  if (row_elements < kWarp) {  // short rows: a lane an element, or most would idle
    const uint32_t per_row = static_cast<uint32_t>(row_elements);
    const uint32_t elements = (task.last_row - task.first_row) * per_row;
    for (uint32_t i = threadIdx.x; i < elements; i += kThreads) {
      const int32_t row = task.first_row + static_cast<int32_t>(i / per_row);
      const Column column[kBatch] = {of_column(i % per_row % m.width)};
      change(of_row(row), column, task.first_row * row_elements + i, 1);
    }
    return;
  }
  const uint32_t width = m.width, lane = threadIdx.x % kWarp;
  for (uint32_t j = lane; j < width; j += kBatch * kWarp) {
    const int count = min(static_cast<int>((width - j + kWarp - 1) / kWarp), kBatch);
    Column column[kBatch] = {};
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (k < count) column[k] = of_column(j + k * kWarp);
    }
    for (int32_t row = task.first_row + threadIdx.x / kWarp; row < task.last_row; row += kWarps) {
      const auto from_row = of_row(row);
      for (int32_t band = 0; band < m.bands; ++band) {
        change(from_row, column, (static_cast<int64_t>(row) * m.bands + band) * m.width + j, count);
      }
    }
  }
}

template <class A>
__device__ A warp_sum(A value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  return value;
}

// Phase 1: the sums of squares of a task's rows and columns. A warp takes whole rows, a lane columns.
template <class T, class A>
__device__ void square_task(const Work& work, const Task& task, double (&shared)[kWarps][kTile]) {
  const Matrix& m = work.matrix[task.tensor];
  if (work.with_grad_only && !m.grad) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool with_cols = any_col_pruned(work, m);
  const T* weight = static_cast<const T*>(m.weight);
  A* row_sq = static_cast<A*>(work.row_sq) + max(m.row_base, 0);
  A* partial =
      static_cast<A*>(work.partial) + m.first_partial + static_cast<int64_t>(task.number) * m.cols;

  if (m.width * m.bands == 1 && !with_cols) {  // a vector: a lane a row, or most would idle
    for (int32_t row = task.first_row + threadIdx.x; row < task.last_row && m.row_base >= 0;
         row += kThreads) {
      const A v = to_number<A>(weight[row]);
      row_sq[row] = v * v;
    }
    return;
  }
  for (int64_t tile = 0; tile < m.width; tile += kTile) {
    const int32_t tile_width = min(static_cast<int32_t>(m.width - tile), kTile);
    A col[kColumnsPerLane] = {};
    const auto fold = [&](bool first) {
#pragma unroll
      for (int k = 0; k < kColumnsPerLane; ++k) {
        double& sum = shared[warp][lane + k * kWarp];
        sum = first ? static_cast<double>(col[k]) : sum + static_cast<double>(col[k]);
        col[k] = 0;
      }
    };
    int32_t bands = 0;  // in col
    bool folded = false;
    if (with_cols) __syncthreads();  // shared and partial: the last tile's readers are done
    for (int32_t row = task.first_row + warp; row < task.last_row; row += kWarps) {
      if (!with_cols && !row_pruned(work, m, row)) continue;
      A sum = 0;
      for (int32_t band = 0; band < m.bands; ++band) {
        const T* w = weight + (static_cast<int64_t>(row) * m.bands + band) * m.width + tile;
        A over_columns = 0;
#pragma unroll
        for (int k = 0; k < kColumnsPerLane; ++k) {
          const int32_t j = lane + k * kWarp;
          const A v = j < tile_width ? to_number<A>(w[j]) : A(0);
          over_columns += v * v;
          col[k] += v * v;
        }
        sum += over_columns;
        if (++bands == kBandsPerFold && with_cols) {
          fold(!folded);
          folded = true;
          bands = 0;
        }
      }
      sum = warp_sum(sum);
      // The same lane for all tiles of a row, so that it reads what it wrote.
      if (lane == 0 && m.row_base >= 0) row_sq[row] = tile == 0 ? sum : row_sq[row] + sum;
    }
    if (!with_cols) continue;
    fold(!folded);
    __syncthreads();
    double over_warps = 0;
    for (int k = 0; k < kWarps; ++k) over_warps += shared[k][threadIdx.x];
    shared[0][threadIdx.x] = over_warps;  // read and written by this thread alone until the next barrier
    __syncthreads();
    const int64_t tile_end = tile + tile_width;
    const int64_t c = static_cast<int32_t>(tile) / m.run + threadIdx.x, first = c * m.run;
    if (first < tile_end) {
      double sum =
          first < tile ? static_cast<double>(partial[c]) : 0.0;  // it reaches over several tiles
      for (int64_t j = max(first, tile); j < min(first + m.run, tile_end); ++j)
        sum += shared[0][j - tile];
      partial[c] = static_cast<A>(sum);
    }
  }
}

// Phase 2: a warp gathers a slice from its rows' sums and its columns' partial sums, in a fixed order
// and in double: a slice may have many.
template <class A>
__device__ A gather_slice(const Work& work, const Matrix& m, int32_t slice) {
  const Plan& plan = work.plan;
  const int lane = threadIdx.x % kWarp;
  const int32_t begin = plan.slice_start[slice], end = plan.slice_start[slice + 1];
  const A* row_sq = static_cast<const A*>(work.row_sq);
  const A* partial = static_cast<const A*>(work.partial) + m.first_partial;
  if (m.tasks == 0 || begin == end) return A(0);
  double sum = 0;
  if (plan.slice_entry[begin] < plan.num_rows) {
    for (int32_t k = begin + lane; k < end; k += kWarp) sum += row_sq[plan.slice_entry[k]];
  } else {
    // Lanes go through all tasks of one column, then on to the next, as through one long list.
    int32_t k = begin, number = lane;
    while (true) {
      for (; k < end && number >= m.tasks; ++k) number -= m.tasks;
      if (k == end) break;
      const int32_t c = plan.slice_entry[k] - plan.num_rows - m.col_base;
      sum += partial[static_cast<int64_t>(number) * m.cols + c];
      number += kWarp;
    }
  }
  return static_cast<A>(warp_sum(sum));
}

// Sums of squares of all slices of the launch's tensors that count, to work.slice_sq. A whole grid calls
// it; what it wrote may be read after the grid's next barrier.
template <class A>
__device__ void slice_squares(const Work& work, cooperative_groups::grid_group grid) {
  __shared__ double shared[kWarps][kTile];
  for (int32_t task = work.first_task + blockIdx.x; task < work.first_task + work.tasks;
       task += gridDim.x) {
    const Task found = find_task(work, task);
    dispatch(work.matrix[found.tensor].dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if constexpr (std::is_same_v<A, double> || !std::is_same_v<T, double>) {
        square_task<T, A>(work, found, shared);
      }
    });
    __syncthreads();
  }
  grid.sync();
  const int32_t warps = gridDim.x * kWarps;
  for (int32_t s = blockIdx.x * kWarps + threadIdx.x / kWarp; s < work.plan.slices; s += warps) {
    const int32_t t = work.plan.slice_tensor[s] - work.first_tensor;
    if (t < 0 || t >= work.tensors || !slice_pruned(work, s)) continue;
    const A sum = gather_slice<A>(work, work.matrix[t], s);
    if (threadIdx.x % kWarp == 0) static_cast<A*>(work.slice_sq)[s] = sum;
  }
}

}  // namespace ocsfast::cuda
