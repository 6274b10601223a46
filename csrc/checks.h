// Every op's arguments are checked here, and nowhere else, before any of their memory is touched.
// Messages name the op, the argument and the value. Host only.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "plan.h"
#include "work.h"

namespace ocsfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Message>
[[noreturn]] void fail(const char* op, const Message&... message) {
  std::ostringstream text;
  text << "ocsfast." << op << ": ";
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// A table of integers or a scalar: dtype, device and number of elements are given.
struct Expected {
  const char* name;
  ScalarType dtype;
  int64_t numel;  // -1: any
  int64_t dim;    // 0 to 2
};
void check_array(const char* op, const Tensor& tensor, const Expected& expected, const Tensor& tables);

// A plan whose counts and offsets agree with one another and with the size of `tables`.
Plan check_plan(const char* op, const Tensor& tables, const std::vector<int64_t>& layout);

// Every entry of its tables, which lie on the CPU, points inside, and the tables of slices and of groups
// agree. Done once, when a plan is bound.
void check_entries(const char* op, const Plan& plan, const std::vector<Matrix>& matrices);

// family_start alone, for the ops that are given tables: on the CPU at every call. On CUDA, where that
// would cost a synchronisation, it is trusted.
void check_families(const char* op, const Plan& plan);

// The same for the tables of the cost model; on the CPU their entries are checked too.
CostModel check_cost(const char* op, const Tensor& tables, const std::vector<int64_t>& layout,
                     const Tensor& plan_tables, int64_t families);

// partition's other arguments: scores are float32 or float64, round_to is positive.
void check_partition(const char* op, const Tensor& scores, const Tensor& limits, int64_t round_to,
                     const Tensor& budget, const Tensor& tables, const Plan& plan);

// The weights as matrices: shapes, strides, dtype and device are those of the plan. `shapes` is the
// plan's, on the CPU wherever the plan itself lies.
std::vector<Matrix> check_weights(const char* op, const std::vector<Tensor>& weights,
                                  const Tensor& tables, const Tensor& shapes, const Plan& plan,
                                  Walker walker);

// A tensor with an element beside each of the weight's: a gradient, or an optimizer's state.
void check_beside(const char* op, const char* name, size_t index, const Tensor& tensor,
                  const Tensor& weight);

// Nothing where no kernel computes in the dtype.
std::optional<DType> dtype_of(ScalarType dtype);

}  // namespace ocsfast
