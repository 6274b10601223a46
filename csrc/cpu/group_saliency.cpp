#include <torch/csrc/stable/library.h>

#include "sums.h"

namespace ocsfast::cpu {
namespace {

// Groups that a thread takes at a time: about ten microseconds of work.
constexpr int64_t kGroupsPerTask = 2048;

template <class Out>
void write(const Plan& plan, const double* slices, const Criterion& criterion, const Tensor& scores,
           const Tensor& slice_out) {
  const std::unique_ptr<double[]> value(new double[plan.slices]);  // not set to 0: each is written below
  Out* out = slice_out.mutable_data_ptr<Out>();
  torch::stable::parallel_for(0, plan.slices, kSlicesPerTask, [&](int64_t first, int64_t last) {
    row_kernels<double>().finish(criterion.finish, slices + first, plan.slice_size + first, last - first,
                                 value.get() + first);
    std::copy(slices + first, slices + last, out + first);
  });
  Out* score = scores.mutable_data_ptr<Out>();
  torch::stable::parallel_for(0, plan.groups, kGroupsPerTask, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      const int32_t begin = plan.group_start[g], end = plan.group_start[g + 1];
      double sum = 0;
      for (int32_t k = begin; k < end; ++k) sum += value[plan.group_slice[k]];
      score[g] = static_cast<Out>(sum / std::max(1, end - begin));
    }
  });
}

void group_saliency(const Tensor& ticket, const Tensor& scores, const Tensor& slice_out,
                    const std::vector<Tensor>& others, const std::string& name, bool squares_known) {
  constexpr const char* kOp = "group_saliency";
  const LockedBound bound(kOp, ticket);
  const auto& [criterion, pointers] = check_saliency(kOp, *bound, scores, slice_out, others, name);
  std::vector<double> own;
  const double* slices = bound->slice_sq.const_data_ptr<double>();
  if (criterion.element != Element::kSquare) {
    own.resize(bound->plan.slices);
    sum_elements(*bound, criterion, pointers, own.data());
    slices = own.data();
  } else if (!squares_known) {
    slices = compute_squares(*bound);
  }
  if (bound->any_double) {
    write<double>(bound->plan, slices, criterion, scores, slice_out);
  } else {
    write<float>(bound->plan, slices, criterion, scores, slice_out);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CPU, m) {
  m.impl("group_saliency", TORCH_BOX(&group_saliency));
}

}  // namespace ocsfast::cpu
