#include <torch/csrc/stable/library.h>

#include "walk.h"

namespace ocsfast::cpu {
namespace {

void sgd_step(const Tensor& ticket, const std::vector<Tensor>& grads, const std::vector<Tensor>& momenta,
              const std::vector<int64_t>& first, const Tensor& lr, double momentum, double dampening,
              double weight_decay, bool nesterov, bool maximize, const std::optional<Tensor>& mask,
              const Tensor& strength, const Tensor& factor, bool known) {
  constexpr const char* kOp = "sgd_step_";
  const Use bound(kOp, ticket);
  const Plan& plan = bound->plan;
  const SgdArguments a =
      check_sgd(kOp, *bound, grads, momenta, first, lr, momentum, mask, strength, factor);
  Penalty penalty;
  std::vector<double> slopes;
  if (mask) {
    penalty.mask = mask->const_data_ptr<bool>();
    penalty.factor = *factor.const_data_ptr<float>();
    if (!known && prunes_any(penalty, plan)) sum_squares(*bound);
    slopes = take_slopes(*bound, penalty.mask, *strength.const_data_ptr<float>());
    penalty.slopes = slopes.data();
  }
  Sums sums(*bound, bound->slice_sq.mutable_data_ptr<double>(), false);
  for_each_task(*bound, [&](const Task& task, State& state) {
    const Matrix& m = bound->matrices[task.tensor];
    const bool penalized = mask && has_slices(m);
    if (!penalized && !a.grads[task.tensor]) return;
    dispatch(m.dtype, [&](auto type) {
      using T = decltype(type);
      using A = accumulator_t<T>;
      Bands<T> bands = bands_of<T>(*bound, task, penalty, state);
      const int64_t offset = bands.w - static_cast<T*>(m.weight);
      const RowKernels<T>& kernels = row_kernels<T>();
      bands.dense = true;
      bands.count = static_cast<int64_t>(task.last_row - task.first_row) * m.bands;
      const bool begins = a.first[task.tensor];
      SgdStep<A> step{static_cast<A>(*lr.const_data_ptr<double>()),
                      static_cast<A>(momentum),
                      begins ? A(1) : static_cast<A>(1 - dampening),
                      static_cast<A>(weight_decay),
                      maximize ? A(-1) : A(1),
                      nesterov,
                      penalized,
                      begins,
                      false};
      if (a.grads[task.tensor]) {
        bands.grad = static_cast<T*>(a.grads[task.tensor]) + offset;
        if (a.momenta[task.tensor]) bands.momentum = static_cast<T*>(a.momenta[task.tensor]) + offset;
      } else {  // Eq. 9 alone, and the squares
        bands.grad = bands.w;
        step.stays = true;
      }
      if (!penalized) return kernels.sgd(bands, step);
      sums.run(task, bands, state, [&](const Bands<T>& b) { kernels.sgd(b, step); });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("sgd_step_", TORCH_BOX(&sgd_step));
}

}  // namespace ocsfast::cpu
