#include <torch/csrc/stable/library.h>

#include "sums.h"

namespace ocsfast::cpu {
namespace {

void lasso_grad(const Tensor& ticket, const std::vector<Tensor>& grads, const Tensor& mask,
                const Tensor& lam, bool squares_known) {
  constexpr const char* kOp = "lasso_grad_";
  const LockedBound bound(kOp, ticket);
  const LassoArguments a = check_lasso(kOp, *bound, grads, mask, lam);
  Penalty penalty;
  penalty.mask = a.mask;
  if (!squares_known) compute_squares(*bound);
  if (!prunes_any(penalty, bound->plan)) return;
  const std::vector<double> slopes = compute_slopes(*bound, a.mask, a.lam.get());
  penalty.slopes = slopes.data();
  for_each_task(*bound, [&](const Task& task, ThreadMemory& memory) {
    const Matrix& m = bound->matrices[task.tensor];
    if (!has_slices(m) || !a.grads[task.tensor]) return;
    dispatch(m.dtype, [&](auto type) {
      using T = decltype(type);
      Bands<T> bands = make_bands<T>(*bound, task, penalty, memory);
      bands.grad = static_cast<T*>(a.grads[task.tensor]) + (bands.w - static_cast<T*>(m.weight));
      if (bands.count > 0) row_kernels<T>().lasso(bands);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("lasso_grad_", TORCH_BOX(&lasso_grad));
}

}  // namespace ocsfast::cpu
