#include <torch/csrc/stable/library.h>

#include <cmath>

#include "slice_squares.h"

namespace ocsfast::cpu {
namespace {

// Groups a thread takes at a time: a few microseconds of square roots.
constexpr int64_t kGroupsPerTask = 2048;

template <class Out>
void write(const Plan& plan, const std::vector<double>& slice_sq, bool squared, Out* scores,
           Out* slice_out) {
  std::copy(slice_sq.begin(), slice_sq.end(), slice_out);
  torch::stable::parallel_for(0, plan.groups, kGroupsPerTask, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      const int32_t begin = plan.group_start[g], end = plan.group_start[g + 1];
      double sum = 0;
      for (int32_t k = begin; k < end; ++k) {
        const int32_t slice = plan.group_slice[k];
        const double root = std::sqrt(static_cast<double>(std::max(1, plan.slice_size[slice])));
        sum += (squared ? slice_sq[slice] : std::sqrt(slice_sq[slice])) / root;
      }
      scores[g] = static_cast<Out>(sum / std::max(1, end - begin));
    }
  });
}

std::tuple<Tensor, Tensor> group_saliency(const std::vector<Tensor>& weights, const Tensor& tables,
                                          const Tensor& shapes, const std::vector<int64_t>& layout,
                                          bool squared) {
  constexpr const char* kOp = "group_saliency";
  const Plan plan = check_plan(kOp, tables, layout);
  check_slices(kOp, plan);
  check_groups(kOp, plan);
  const std::vector<Matrix> matrices = check_weights(kOp, weights, nullptr, tables, shapes, plan);
  const ScalarType dtype = any_double(matrices) ? ScalarType::Double : ScalarType::Float;
  Tensor scores = torch::stable::new_empty(tables, {plan.groups}, dtype);
  Tensor slice_out = torch::stable::new_empty(tables, {plan.slices}, dtype);
  const std::vector<Task> tasks = list_tasks(matrices);
  SliceSquares squares(plan, matrices, nullptr);
  for_each_task<Scratch>(tasks.size(),
                         [&](int64_t i, Scratch& scratch) { squares.run(tasks[i], scratch); });
  const std::vector<double>& slice_sq = squares.result();
  if (dtype == ScalarType::Double) {
    write(plan, slice_sq, squared, scores.mutable_data_ptr<double>(),
          slice_out.mutable_data_ptr<double>());
  } else {
    write(plan, slice_sq, squared, scores.mutable_data_ptr<float>(),
          slice_out.mutable_data_ptr<float>());
  }
  return {scores, slice_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("group_saliency", TORCH_BOX(&group_saliency));
}

}  // namespace ocsfast::cpu
