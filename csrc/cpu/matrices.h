// What the CPU kernels share: elements as numbers, tasks as rows, masks as flags.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../checks.h"

namespace ocsfast::cpu {

// The type a weight of type T is computed in.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename Accumulator<T>::type;

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

Pruned find_pruned(const Plan& plan, const std::vector<Matrix>& matrices, const bool* mask);

// Sums of squares of all slices: [plan.slices]. With `pruned`, only slices of pruned groups are right.
std::vector<double> slice_squares(const Plan& plan, const std::vector<Matrix>& matrices,
                                  const std::vector<Task>& tasks, const Pruned* pruned);

}  // namespace ocsfast::cpu
