// The coupled tensors of one call as matrices, cut into tasks. Host and device.
//
// A tensor is `rows` rows of `bands` bands of `width` elements, one behind the other. Contiguous:
// one band of cols * inner elements, `run` = inner of them to a column. channels_last: inner bands
// of cols elements, one to a column.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ocsfast {

enum class DType : uint8_t { kFloat, kDouble, kHalf, kBFloat16 };

struct Matrix {
  void* weight;
  void* grad;             // lasso_grad_ only; null: the tensor has no gradient and is skipped
  int64_t first_partial;  // where the column sums of its tasks start: [tasks of it, cols]
  int32_t rows, cols, width, bands, run;
  int32_t row_base, col_base;  // in row_slice, col_slice; -1: no row (column) has a slice
  int32_t rows_per_task, first_task, tasks;
  DType dtype;
};

// Elements a task has about: its start-up is lost in its work, and 2 MB of weights feed many threads.
constexpr int64_t kTaskElements = 65536;
// A task writes one sum a column. At least this many of a row's `run`s go into each on the CPU, and this
// many elements on CUDA, which needs more tasks: so these sums, written and read again, stay a few per
// cent of the work however long the rows are.
constexpr int64_t kRunsPerColumnCpu = 64;
constexpr int64_t kElementsPerColumnCuda = 32;

inline int32_t rows_per_task(int64_t rows, int64_t cols, int64_t inner, int64_t elements_per_column) {
  const int64_t by_size = kTaskElements / std::max<int64_t>(1, cols * inner);
  const int64_t by_columns = (elements_per_column + inner - 1) / std::max<int64_t>(1, inner);
  return static_cast<int32_t>(
      std::clamp<int64_t>(std::max(by_size, by_columns), 1, std::max<int64_t>(1, rows)));
}

}  // namespace ocsfast
