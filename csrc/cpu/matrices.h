// What the CPU kernels share: elements as numbers, tasks as rows, masks as flags.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../checks.h"
#include "rows.h"

namespace ocsfast::cpu {

// Calls f(T{}) with the element type of a matrix.
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float{});
    case DType::kDouble:
      return f(double{});
    case DType::kHalf:
      return f(c10::Half{});
    case DType::kBFloat16:
      return f(c10::BFloat16{});
  }
}

struct Task {
  int32_t tensor, first_row, last_row;
};

std::vector<Task> list_tasks(const std::vector<Matrix>& matrices);

// Which rows and columns of the weights lie in a slice of a pruned group.
struct Pruned {
  std::vector<uint8_t> row;               // [plan.num_rows]
  std::vector<uint8_t> col;               // [plan.num_cols]
  std::vector<uint8_t> any_row, any_col;  // [tensors]
  bool touches(int32_t tensor) const { return any_row[tensor] || any_col[tensor]; }
};

// Elements first .. last - 1 of a band.
struct Span {
  int64_t first, last;
};

// Spans that hold every pruned column of a matrix and no more of the others than shares their cache
// lines.
std::vector<Span> pruned_spans(const Matrix& m, const Pruned& pruned);

Pruned find_pruned(const Plan& plan, const std::vector<Matrix>& matrices, const bool* mask);

}  // namespace ocsfast::cpu
