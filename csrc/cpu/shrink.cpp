#include <torch/csrc/stable/library.h>

#include "matrices.h"
#include "parallel.h"

namespace ocsfast::cpu {
namespace {

template <class T, class A>
void scale(T* __restrict w, int64_t width, A factor) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) w[j] = static_cast<T>(static_cast<A>(w[j]) * factor);
}

template <class T, class A>
void scale_columns(T* __restrict w, int64_t width, const A* __restrict factors) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) w[j] = static_cast<T>(static_cast<A>(w[j]) * factors[j]);
}

template <class T>
void shrink_task(const Matrix& m, const Task& task, const Pruned& pruned, float factor,
                 Scratch& scratch) {
  using A = accumulator_t<T>;
  const int64_t width = m.width;
  const A once = factor, twice = once * once;
  const bool any_col = pruned.any_col[task.tensor];
  A* kept_row = scratch.get<A>(any_col ? 2 * width : 0);
  A* pruned_row = kept_row + width;
  for (int64_t c = 0, j = 0; any_col && c < m.cols; ++c) {
    const bool col = pruned.col[m.col_base + c];
    for (int64_t end = j + m.run; j < end; ++j) {
      kept_row[j] = col ? once : A(1);
      pruned_row[j] = col ? twice : once;
    }
  }
  T* w = static_cast<T*>(m.weight) + static_cast<int64_t>(task.first_row) * m.bands * width;
  for (int32_t r = task.first_row; r < task.last_row; ++r) {
    const bool row = m.row_base >= 0 && pruned.row[m.row_base + r];
    for (int32_t b = 0; b < m.bands; ++b, w += width) {
      if (any_col) {
        scale_columns(w, width, row ? pruned_row : kept_row);
      } else if (row) {
        scale(w, width, once);
      }
    }
  }
}

void shrink(const std::vector<Tensor>& weights, const Tensor& tables, const Tensor& shapes,
            const std::vector<int64_t>& layout, const Tensor& mask, const Tensor& factor) {
  constexpr const char* kOp = "shrink_";
  const Plan plan = check_plan(kOp, tables, layout);
  const std::vector<Matrix> matrices = check_weights(kOp, weights, nullptr, tables, shapes, plan);
  check_array(kOp, mask, {"mask", ScalarType::Bool, plan.groups, 1}, tables);
  check_array(kOp, factor, {"factor", ScalarType::Float, 1, 0}, tables);
  const Pruned pruned = find_pruned(plan, matrices, mask.const_data_ptr<bool>());
  const float value = *factor.const_data_ptr<float>();
  const std::vector<Task> tasks = list_tasks(matrices);
  for_each_task(tasks.size(), [&](int64_t i, Scratch& scratch) {
    if (!pruned.touches(tasks[i].tensor)) return;
    const Matrix& m = matrices[tasks[i].tensor];
    dispatch(m.dtype,
             [&](auto type) { shrink_task<decltype(type)>(m, tasks[i], pruned, value, scratch); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("shrink_", TORCH_BOX(&shrink));
}

}  // namespace ocsfast::cpu
