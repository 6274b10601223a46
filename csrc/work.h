// The tensors of a plan as matrices, cut into tasks. Host and device.
//
// A tensor is `rows` rows of `bands` bands of `width` elements, one behind the other. Contiguous:
// one band of cols * inner elements, `run` = inner of them to a column. channels_last: inner bands
// of cols elements, one to a column. A vector is one row. A tensor without slices is a string of
// elements, whatever its shape: rows of kTaskElements, the last of them shorter.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan.h"

namespace ocsfast {

enum class DType : uint8_t { kFloat, kDouble, kHalf, kBFloat16 };

// Whose kernels walk the tensors.
enum class Walker : uint8_t { kCpu, kCuda };

struct Matrix {
  void* weight;
  int64_t elements;
  int64_t first_partial;  // where the column sums of its tasks start: [tasks of it, cols]
  int32_t rows, cols, width, bands, run;
  int32_t row_base, col_base;  // in row_slice, col_slice; -1: no row (column) has a slice
  int32_t rows_per_task, first_task, tasks;
  DType dtype;
};

// Elements a task has about: its start-up is lost in its work, and 2 MB of weights feed many threads.
constexpr int32_t kTaskElements = 65536;
// A task writes one sum a column. At least this many of a row's `run`s go into each on the CPU, and this
// many elements on CUDA, which needs more tasks: so these sums, written and read again, stay a few per
// cent of the work however long the rows are.
constexpr int64_t kRunsPerColumnCpu = 128;
constexpr int64_t kElementsPerColumnCuda = 32;

inline int32_t rows_per_task(int64_t rows, int64_t cols, int64_t inner, int64_t elements_per_column) {
  const int64_t by_size = kTaskElements / std::max<int64_t>(1, cols * inner);
  const int64_t by_columns = (elements_per_column + inner - 1) / std::max<int64_t>(1, inner);
  return static_cast<int32_t>(
      std::clamp<int64_t>(std::max(by_size, by_columns), 1, std::max<int64_t>(1, rows)));
}

// Rows first_row .. last_row - 1 of a tensor; `number` among the tensor's tasks.
struct Task {
  int32_t tensor, number, first_row, last_row;
};

OCSFAST_HOST_DEVICE inline bool has_slices(const Matrix& m) {
  return m.row_base >= 0 || m.col_base >= 0;
}

// Of a band that starts at row `row`.
OCSFAST_HOST_DEVICE inline int32_t band_width(const Matrix& m, int32_t row) {
  const int64_t left = m.elements - static_cast<int64_t>(row) * m.bands * m.width;
  return left < m.width ? static_cast<int32_t>(left) : m.width;
}

OCSFAST_HOST_DEVICE inline Task find_task(const Matrix* matrices, int32_t count, int32_t task) {
  int32_t low = 0, high = count - 1;
  while (low < high) {  // the last tensor whose first task is not after this one; empty ones have none
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

}  // namespace ocsfast
