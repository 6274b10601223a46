#include <torch/csrc/stable/library.h>

#include <cmath>

#include "matrices.h"
#include "parallel.h"

namespace ocsfast::cpu {
namespace {

// grad += w * (row + cols). Where no slice is pruned, grad stays as it is, even beside an infinite
// weight.
template <class T, class A>
void add_penalty(T* __restrict grad, const T* __restrict w, int64_t width, A row,
                 const A* __restrict cols) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    const A factor = row + cols[j];
    const T sum = static_cast<T>(static_cast<A>(grad[j]) + static_cast<A>(w[j]) * factor);
    grad[j] = factor != A(0) ? sum : grad[j];
  }
}

template <class T, class A>
void add_penalty(T* __restrict grad, const T* __restrict w, int64_t width, A row) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    grad[j] = static_cast<T>(static_cast<A>(grad[j]) + static_cast<A>(w[j]) * row);
  }
}

// slice_factor: [slices] strength / |slice|, 0 where the slice's group stays or its norm is 0.
template <class T>
void lasso_task(const Plan& plan, const Matrix& m, const Task& task, const Pruned& pruned,
                const std::vector<double>& slice_factor, Scratch& scratch) {
  using A = accumulator_t<T>;
  const int64_t width = m.width;
  const bool any_col = pruned.any_col[task.tensor];
  A* cols = scratch.get<A>(any_col ? width : 0);
  for (int64_t c = 0; any_col && c < m.cols; ++c) {
    const int32_t slice = plan.col_slice[m.col_base + c];
    std::fill_n(cols + c * m.run, m.run, slice < 0 ? A(0) : static_cast<A>(slice_factor[slice]));
  }
  const int64_t offset = static_cast<int64_t>(task.first_row) * m.bands * width;
  const T* w = static_cast<const T*>(m.weight) + offset;
  T* grad = static_cast<T*>(m.grad) + offset;
  for (int32_t r = task.first_row; r < task.last_row; ++r) {
    const int32_t slice = m.row_base < 0 ? -1 : plan.row_slice[m.row_base + r];
    const A row = slice < 0 ? A(0) : static_cast<A>(slice_factor[slice]);
    for (int32_t b = 0; b < m.bands; ++b, w += width, grad += width) {
      if (any_col) {
        add_penalty(grad, w, width, row, cols);
      } else if (row != A(0)) {
        add_penalty(grad, w, width, row);
      }
    }
  }
}

void lasso_grad(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                const Tensor& tables, const Tensor& shapes, const std::vector<int64_t>& layout,
                const Tensor& mask, const Tensor& strength) {
  constexpr const char* kOp = "lasso_grad_";
  const Plan plan = check_plan(kOp, tables, layout);
  const std::vector<Matrix> matrices = check_weights(kOp, weights, &grads, tables, shapes, plan);
  check_array(kOp, mask, {"mask", ScalarType::Bool, plan.groups, 1}, tables);
  check_array(kOp, strength, {"strength", ScalarType::Float, 1, 0}, tables);
  const bool* masked = mask.const_data_ptr<bool>();
  const double value = *strength.const_data_ptr<float>();
  Pruned pruned = find_pruned(plan, matrices, masked);
  for (size_t t = 0; t < matrices.size(); ++t) {
    if (!matrices[t].grad) pruned.any_row[t] = pruned.any_col[t] = false;
  }
  const std::vector<Task> tasks = list_tasks(matrices);
  std::vector<double> slice_factor = slice_squares(plan, matrices, tasks, &pruned);
  for (int32_t s = 0; s < plan.slices; ++s) {
    const bool counts = masked[plan.slice_group[s]] && slice_factor[s] != 0;
    slice_factor[s] = counts ? value / std::sqrt(slice_factor[s]) : 0.0;
  }
  for_each_task(tasks.size(), [&](int64_t i, Scratch& scratch) {
    if (!pruned.touches(tasks[i].tensor)) return;
    const Matrix& m = matrices[tasks[i].tensor];
    dispatch(m.dtype, [&](auto type) {
      lasso_task<decltype(type)>(plan, m, tasks[i], pruned, slice_factor, scratch);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("lasso_grad_", TORCH_BOX(&lasso_grad));
}

}  // namespace ocsfast::cpu
