#include <torch/csrc/stable/library.h>

#include "walk.h"

namespace ocsfast::cpu {
namespace {

void lasso_grad(const Tensor& ticket, const std::vector<Tensor>& grads, const Tensor& mask,
                const Tensor& strength, bool known) {
  constexpr const char* kOp = "lasso_grad_";
  const Use bound(kOp, ticket);
  const std::vector<void*> grad = pointers_beside(kOp, "grads", grads, *bound);
  check_array(kOp, mask, {"mask", ScalarType::Bool, bound->plan.groups, 1}, bound->tables);
  check_array(kOp, strength, {"strength", ScalarType::Float, 1, 0}, bound->tables);
  Penalty penalty;
  penalty.mask = mask.const_data_ptr<bool>();
  if (!known) sum_squares(*bound);
  if (!prunes_any(penalty, bound->plan)) return;
  const std::vector<double> slopes =
      take_slopes(*bound, penalty.mask, *strength.const_data_ptr<float>());
  penalty.slopes = slopes.data();
  for_each_task(*bound, [&](const Task& task, State& state) {
    const Matrix& m = bound->matrices[task.tensor];
    if (!has_slices(m) || !grad[task.tensor]) return;
    dispatch(m.dtype, [&](auto type) {
      using T = decltype(type);
      Bands<T> bands = bands_of<T>(*bound, task, penalty, state);
      bands.grad = static_cast<T*>(grad[task.tensor]) + (bands.w - static_cast<T*>(m.weight));
      if (bands.count > 0) row_kernels<T>().lasso(bands);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("lasso_grad_", TORCH_BOX(&lasso_grad));
}

}  // namespace ocsfast::cpu
