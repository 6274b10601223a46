#include <torch/csrc/stable/library.h>

#include "sums.h"

namespace ocsfast::cpu {
namespace {

void shrink(const Tensor& ticket, const Tensor& mask, const Tensor& factor) {
  constexpr const char* kOp = "shrink_";
  const LockedBound bound(kOp, ticket);
  const ShrinkArguments a = check_shrink(kOp, *bound, mask, factor);
  Penalty penalty;
  penalty.mask = a.mask;
  penalty.factor = a.factor.get();
  if (!prunes_any(penalty, bound->plan)) return;
  Sums sums(*bound, bound->slice_sq.mutable_data_ptr<double>(), true);
  for_each_task(*bound, [&](const Task& task, ThreadMemory& memory) {
    const Matrix& m = bound->matrices[task.tensor];
    if (!has_slices(m)) return;
    dispatch(m.dtype, [&](auto type) {
      using T = decltype(type);
      sums.run(task, make_bands<T>(*bound, task, penalty, memory), memory, row_kernels<T>().shrink);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("shrink_", TORCH_BOX(&shrink));
}

}  // namespace ocsfast::cpu
