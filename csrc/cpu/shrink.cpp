#include <torch/csrc/stable/library.h>

#include "matrices.h"
#include "parallel.h"

namespace ocsfast::cpu {
namespace {

// What a thread knows about the columns of the tensor it is at.
struct Columns {
  int32_t tensor = -1;
  std::vector<Span> spans;
  Scratch factors;  // [2, width]: those of a row that is kept, then those of one that is pruned
};

template <class T>
void shrink_task(const Matrix& m, const Task& task, const Pruned& pruned, float factor,
                 Columns& columns) {
  using A = accumulator_t<T>;
  const RowKernels<T>& kernels = row_kernels<T>();
  const int64_t width = m.width;
  const A once = factor, twice = once * once;
  const bool any_col = pruned.any_col[task.tensor];
  A* kept_row = columns.factors.get<A>(any_col ? 2 * width : 0);
  A* pruned_row = kept_row + width;
  if (any_col && columns.tensor != task.tensor) {
    columns.tensor = task.tensor;
    columns.spans = pruned_spans(m, pruned);
    for (int64_t c = 0; c < m.cols; ++c) {
      const bool col = pruned.col[m.col_base + c];
      std::fill_n(kept_row + c * m.run, m.run, col ? once : A(1));
      std::fill_n(pruned_row + c * m.run, m.run, col ? twice : once);
    }
  }
  T* w = static_cast<T*>(m.weight) + static_cast<int64_t>(task.first_row) * m.bands * width;
  for (int32_t r = task.first_row; r < task.last_row; ++r) {
    const bool row = m.row_base >= 0 && pruned.row[m.row_base + r];
    if (!any_col) {
      if (row) kernels.scale(w, m.bands * width, once);
      w += m.bands * width;
      continue;
    }
    for (int32_t b = 0; b < m.bands; ++b, w += width) {
      if (row) {
        kernels.scale_by(w, width, pruned_row);
      } else {
        for (const auto& [first, last] : columns.spans)
          kernels.scale_by(w + first, last - first, kept_row + first);
      }
    }
  }
}

void shrink(const std::vector<Tensor>& weights, const Tensor& tables, const Tensor& shapes,
            const std::vector<int64_t>& layout, const Tensor& mask, const Tensor& factor) {
  constexpr const char* kOp = "shrink_";
  const Plan plan = check_plan(kOp, tables, layout);
  check_slices(kOp, plan);
  const std::vector<Matrix> matrices = check_weights(kOp, weights, nullptr, tables, shapes, plan);
  check_array(kOp, mask, {"mask", ScalarType::Bool, plan.groups, 1}, tables);
  check_array(kOp, factor, {"factor", ScalarType::Float, 1, 0}, tables);
  const Pruned pruned = find_pruned(plan, matrices, mask.const_data_ptr<bool>());
  const float value = *factor.const_data_ptr<float>();
  const std::vector<Task> tasks = list_tasks(matrices);
  for_each_task<Columns>(tasks.size(), [&](int64_t i, Columns& columns) {
    if (!pruned.touches(tasks[i].tensor)) return;
    const Matrix& m = matrices[tasks[i].tensor];
    dispatch(m.dtype,
             [&](auto type) { shrink_task<decltype(type)>(m, tasks[i], pruned, value, columns); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("shrink_", TORCH_BOX(&shrink));
}

}  // namespace ocsfast::cpu
