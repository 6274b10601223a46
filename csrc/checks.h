// Every argument of every op is checked here, and nowhere else, before any of its memory is touched. Two
// questions are not about arguments and are asked where the answer is: whether a ticket is still valid
// (bound.cpp), and whether a CUDA graph is being captured (cuda/bind.cu).
//
// Messages name the op, the argument and the value. Host only.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "matrix.h"
#include "plan.h"

namespace ocsfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Bound;

template <class... Message>
[[noreturn]] void fail(const char* op, const Message&... message) {
  std::ostringstream text;
  text << "ocsfast." << op << ": ";
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// The kernels' name for a dtype; nothing where no kernel computes in it.
std::optional<DType> find_dtype(ScalarType dtype);

// --- Tensors: check_tensors.cpp ---

// A tensor whose dtype and number of elements are given: a table, a mask or a scalar.
struct Expected {
  const char* name;
  ScalarType dtype;
  int64_t numel;  // -1: any
  int64_t dim;    // 0 to 2
};
// It is contiguous and lies where `tables` lies.
void check_array(const char* op, const Tensor& tensor, const Expected& expected, const Tensor& tables);

// A 0-dim tensor of the dtype that T is, on the CPU or where `tables` lies.
template <class T>
Number<T> check_number(const char* op, const char* name, const Tensor& number, const Tensor& tables);

// How a tensor lies. The codes are torch's own: to ask for one is a call, to translate it a dozen.
struct Form {
  std::vector<int64_t> sizes, strides;
  int32_t dtype, device_type, device_index;
};
Form form_of(const Tensor& tensor);
// The stride of a dimension of size 1 is not looked at.
bool has_form(const Tensor& tensor, const Form& form);

// One tensor like each weight, such as a gradient: of the weight's shape, strides, dtype and device.
// Returns pointers; null where the tensor is empty, which stands for none.
std::vector<void*> check_like_weights(const char* op, const char* name,
                                      const std::vector<Tensor>& tensors, const Bound& bound);

// The weights as matrices: shapes, strides, dtype and device are those the plan was built for. `shapes`
// is Plan.shapes.
std::vector<Matrix> check_weights(const char* op, const std::vector<Tensor>& weights,
                                  const Tensor& tables, const Tensor& shapes, const Plan& plan,
                                  Backend backend);

// The weights have the memory, size, dtype and device they had when the plan was bound to them.
void check_unchanged(const char* op, const Bound& bound);

// --- Tables: check_tables.cpp ---

// The counts and offsets of `layout` agree with one another and with the size of `tables`. The entries
// of the tables are not read.
Plan check_plan(const char* op, const Tensor& tables, const std::vector<int64_t>& layout);

// Every entry of the tables points inside, and the tables of slices and of groups agree. Reads them, so
// they have to lie on the CPU. Done once, when a plan is bound.
void check_entries(const char* op, const Plan& plan, const std::vector<Matrix>& matrices);

// family_start alone, for the ops that are given tables instead of a ticket. Checked at every call on
// the CPU, and trusted on CUDA, where reading it would cost a synchronisation.
void check_families(const char* op, const Plan& plan, const Tensor& tables);

// As check_plan. On the CPU the entries are checked too.
CostModel check_cost(const char* op, const Tensor& tables, const std::vector<int64_t>& layout,
                     const Tensor& plan_tables, int64_t families);

// --- One for each op: checks.cpp ---

// The number in a ticket (see bound.h).
int64_t check_ticket(const char* op, const Tensor& ticket);

SaliencyArguments check_saliency(const char* op, const Bound& bound, const Tensor& scores,
                                 const Tensor& slices, const std::vector<Tensor>& others,
                                 const std::string& criterion);

PartitionArguments check_partition(const char* op, const Tensor& scores, const Tensor& tables,
                                   const std::vector<int64_t>& layout, const Tensor& cost_tables,
                                   const std::vector<int64_t>& cost_layout, const Tensor& limits,
                                   const Tensor& budget, const std::optional<Tensor>& units,
                                   const std::optional<Tensor>& ties, bool give_back);

CompareArguments check_compare(const char* op, const Tensor& mask, const Tensor& sizes,
                               const Tensor& cost, const Tensor& status,
                               const std::optional<Tensor>& first, const std::optional<Tensor>& last,
                               const Tensor& tables, const std::vector<int64_t>& layout);

ShrinkArguments check_shrink(const char* op, const Bound& bound, const Tensor& mask,
                             const Tensor& factor);

LassoArguments check_lasso(const char* op, const Bound& bound, const std::vector<Tensor>& grads,
                           const Tensor& mask, const Tensor& lam);

StepArguments check_step(const char* op, const Bound& bound, const std::vector<Tensor>& grads,
                         const Tensor& lr, bool maximize, const std::optional<Tensor>& mask,
                         const std::optional<Tensor>& lam, const std::optional<Tensor>& factor,
                         bool squares_known, const std::optional<Tensor>& grad_scale,
                         const std::optional<Tensor>& found_inf);

SgdArguments check_sgd(const char* op, const Bound& bound, const StepArguments& step,
                       const std::vector<Tensor>& momenta, const std::vector<int64_t>& first,
                       double momentum);

AdamwArguments check_adamw(const char* op, const Bound& bound, const StepArguments& step,
                           const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                           const std::vector<Tensor>& steps, double beta1, double beta2);

}  // namespace ocsfast
