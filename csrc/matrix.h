// The tensors of a plan as matrices, and their division into tasks. Host and device.
//
// A matrix has `rows` rows, one behind the other in memory. A row consists of `bands` bands of `width`
// elements. A band is a stretch of memory that passes through the columns in order, `run` elements in
// each:
//   contiguous      1 band of cols * inner elements, run = inner
//   channels_last   inner bands of cols elements, run = 1
// A vector has one row. A tensor without slices is a string of elements, whatever its shape: its rows
// have as many elements as a task, the last row the rest.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan.h"

namespace ocsfast {

enum class DType : uint8_t { kFloat, kDouble, kHalf, kBFloat16 };

// The kernels that walk the matrices.
enum class Backend : uint8_t { kCpu, kCuda };

struct Matrix {
  void* weight;
  int64_t elements;
  int64_t first_partial;  // where its column sums start among the partials: [tasks, cols]
  int32_t rows, cols, width, bands, run;
  int32_t row_base, col_base;  // offset in row_slice, col_slice; -1: no row (column) has a slice
  int32_t rows_per_task, first_task, tasks;
  DType dtype;
};

// Rows first_row .. last_row - 1 of a matrix. `number` counts the tasks of one matrix from 0.
struct Task {
  int32_t tensor, number, first_row, last_row;
};

// Elements of a task on the CPU, about: 256 KB of float32, which take tens of microseconds to read, so
// that starting a task does not count. Larger tasks would leave threads idle: so cut, a layer of 2 MB
// still feeds eight.
constexpr int64_t kTaskElementsCpu = 65536;
// On CUDA it goes by the plan. Each task costs a block some microseconds, for reading what it is and the
// penalties of its rows and columns, and for handing on its sums. On an H200 SGD's penalized step of
// ResNet50 took 0.293 ms with tasks of 20 K elements, 0.251 with 36 K, and as long with 32 K as with 64
// K once slices were gathered faster. With 1.1 B parameters in bfloat16 it took 3.77, 3.68 and 4.12 ms
// with 128 K, 256 K and a million: smaller ones have more column sums, larger ones leave blocks idle.
constexpr int64_t kTasksCuda = 1536, kLeastElementsCuda = 65536, kMostElementsCuda = 262144;
constexpr int64_t kTaskGrain = 4096;
// A task writes one sum for each column, which is read again when slices are gathered. To keep this at a
// few per cent of the work where a row is longer than a task, at least so much of a column goes into
// each sum: 128 runs on the CPU; 32 elements on CUDA, which needs more tasks to fill its SMs.
constexpr int64_t kRunsPerColumnCpu = 128;
constexpr int64_t kElementsPerColumnCuda = 32;

// Elements of a task, of a plan with so many in all.
inline int64_t elements_per_task(Backend backend, int64_t all) {
  if (backend == Backend::kCpu) return kTaskElementsCpu;
  const int64_t share = (all / kTasksCuda + kTaskGrain - 1) / kTaskGrain * kTaskGrain;
  return std::clamp(share, kLeastElementsCuda, kMostElementsCuda);
}

OCSFAST_HOST_DEVICE inline bool has_slices(const Matrix& m) {
  return m.row_base >= 0 || m.col_base >= 0;
}

// The width of the bands of row `row`: only the last row of a tensor without slices may be shorter.
OCSFAST_HOST_DEVICE inline int32_t band_width(const Matrix& m, int32_t row) {
  const int64_t left = m.elements - static_cast<int64_t>(row) * m.bands * m.width;
  return left < m.width ? static_cast<int32_t>(left) : m.width;
}

// Task number `task` of all matrices together. Host only.
inline Task find_task(const Matrix* matrices, int32_t count, int32_t task) {
  int32_t low = 0, high = count - 1;
  while (low < high) {  // the last matrix whose first task is at most `task`; empty ones have no task
    const int32_t middle = (low + high + 1) / 2;
    if (matrices[middle].first_task <= task) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Matrix& m = matrices[low];
  const int32_t number = task - m.first_task, first = number * m.rows_per_task;
  const int32_t last = first + m.rows_per_task;
  return {low, number, first, last < m.rows ? last : m.rows};
}

// Sets rows, cols, width, bands, run and the tasks of a matrix from its shape; weight, elements and
// bases are set already. Host only.
inline void divide_into_tasks(Matrix& m, int64_t rows, int64_t cols, int64_t inner, bool channels_last,
                              Backend backend, int64_t task_elements) {
  if (has_slices(m)) {
    m.rows = static_cast<int32_t>(rows);
    m.cols = static_cast<int32_t>(cols);
    m.bands = static_cast<int32_t>(channels_last ? inner : 1);
    m.run = static_cast<int32_t>(channels_last ? 1 : inner);
    m.width = m.cols * m.run;
    const int64_t per_column =
        backend == Backend::kCpu ? kRunsPerColumnCpu * m.run : kElementsPerColumnCuda;
    const int64_t by_size = task_elements / std::max<int64_t>(1, cols * inner);
    const int64_t by_columns = (per_column + inner - 1) / std::max<int64_t>(1, inner);
    m.rows_per_task = static_cast<int32_t>(
        std::clamp<int64_t>(std::max(by_size, by_columns), 1, std::max<int64_t>(1, rows)));
  } else {
    m.rows = static_cast<int32_t>((m.elements + task_elements - 1) / task_elements);
    m.cols = m.width = static_cast<int32_t>(task_elements);
    m.bands = m.run = m.rows_per_task = 1;
  }
  const int64_t tasks = (static_cast<int64_t>(m.rows) + m.rows_per_task - 1) / m.rows_per_task;
  m.tasks = m.elements == 0 ? 0 : static_cast<int32_t>(tasks);
}

}  // namespace ocsfast
