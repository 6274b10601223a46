#include <torch/csrc/stable/library.h>

#include <cmath>
#include <utility>

#include "slice_squares.h"

namespace ocsfast::cpu {
namespace {

// What a thread reuses: its memory for sums, and what it knows about the columns of the tensor it is at.
struct State {
  Scratch sums;
  int32_t tensor = -1;
  std::vector<Span> spans;
  Scratch factors;  // [width]
};

// The sums of a tensor, or its update.
struct Step {
  Task task;
  bool update;
};

// Each tensor's update follows the sums of the tensor after it: its weights are then still in the cache,
// and no thread has to wait long for the last of its sums.
std::vector<Step> list_steps(const std::vector<Task>& tasks, const Pruned& pruned) {
  std::vector<Step> steps, updates;
  for (size_t i = 0; i < tasks.size();) {
    const std::vector<Step> due = std::exchange(updates, {});
    const int32_t tensor = tasks[i].tensor;
    for (; i < tasks.size() && tasks[i].tensor == tensor; ++i) {
      if (!pruned.touches(tensor)) continue;
      steps.push_back({tasks[i], false});
      updates.push_back({tasks[i], true});
    }
    steps.insert(steps.end(), due.begin(), due.end());
  }
  steps.insert(steps.end(), updates.begin(), updates.end());
  return steps;
}

// factor(slice): strength / |slice|, 0 where the slice's group stays, its norm is 0, or it is -1.
template <class T, class Factor>
void lasso_task(const Plan& plan, const Matrix& m, const Task& task, const Pruned& pruned,
                const Factor& factor, State& state) {
  using A = accumulator_t<T>;
  const RowKernels<T>& kernels = row_kernels<T>();
  const int64_t width = m.width;
  const bool any_col = pruned.any_col[task.tensor];
  A* cols = state.factors.get<A>(any_col ? width : 0);
  if (any_col && state.tensor != task.tensor) {
    state.tensor = task.tensor;
    state.spans = pruned_spans(m, pruned);
    for (int64_t c = 0; c < m.cols; ++c) {
      std::fill_n(cols + c * m.run, m.run, static_cast<A>(factor(plan.col_slice[m.col_base + c])));
    }
  }
  const int64_t offset = static_cast<int64_t>(task.first_row) * m.bands * width;
  const T* w = static_cast<const T*>(m.weight) + offset;
  T* grad = static_cast<T*>(m.grad) + offset;
  for (int32_t r = task.first_row; r < task.last_row; ++r) {
    const A row = m.row_base < 0 ? A(0) : static_cast<A>(factor(plan.row_slice[m.row_base + r]));
    for (int32_t b = 0; b < m.bands; ++b, w += width, grad += width) {
      if (!any_col) {
        if (row != A(0)) kernels.add(grad, w, width, row);
      } else if (row != A(0)) {
        kernels.add_by(grad, w, width, row, cols);
      } else {
        for (const auto& [first, last] : state.spans)
          kernels.add_by(grad + first, w + first, last - first, row, cols + first);
      }
    }
  }
}

void lasso_grad(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                const Tensor& tables, const Tensor& shapes, const std::vector<int64_t>& layout,
                const Tensor& mask, const Tensor& strength) {
  constexpr const char* kOp = "lasso_grad_";
  const Plan plan = check_plan(kOp, tables, layout);
  check_slices(kOp, plan);
  const std::vector<Matrix> matrices = check_weights(kOp, weights, &grads, tables, shapes, plan);
  check_array(kOp, mask, {"mask", ScalarType::Bool, plan.groups, 1}, tables);
  check_array(kOp, strength, {"strength", ScalarType::Float, 1, 0}, tables);
  const bool* masked = mask.const_data_ptr<bool>();
  const double value = *strength.const_data_ptr<float>();
  Pruned pruned = find_pruned(plan, matrices, masked);
  for (size_t t = 0; t < matrices.size(); ++t) {
    if (!matrices[t].grad) pruned.any_row[t] = pruned.any_col[t] = false;
  }
  SliceSquares squares(plan, matrices, &pruned);
  const std::vector<double>& slice_sq = squares.result();
  const auto slice_factor = [&](int32_t slice) {
    const bool counts = slice >= 0 && masked[plan.slice_group[slice]] && slice_sq[slice] != 0;
    return counts ? value / std::sqrt(slice_sq[slice]) : 0.0;
  };
  const std::vector<Step> steps = list_steps(list_tasks(matrices), pruned);
  for_each_task<State>(steps.size(), [&](int64_t i, State& state) {
    const auto& [task, update] = steps[i];
    if (!update) return squares.run(task, state.sums);
    squares.wait_for(task.tensor);
    const Matrix& m = matrices[task.tensor];
    dispatch(m.dtype,
             [&](auto type) { lasso_task<decltype(type)>(plan, m, task, pruned, slice_factor, state); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("lasso_grad_", TORCH_BOX(&lasso_grad));
}

}  // namespace ocsfast::cpu
