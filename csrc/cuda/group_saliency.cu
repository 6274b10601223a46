#include "launch.cuh"

namespace ocsfast::cuda {
namespace {

template <class A>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    saliency_kernel(const __grid_constant__ Work work, A* scores, bool squared) {
  const auto grid = cooperative_groups::this_grid();
  slice_squares<A>(work, grid);
  if (!work.last) return;
  grid.sync();
  const Plan& plan = work.plan;
  const A* slice_sq = static_cast<const A*>(work.slice_sq);
  for (int32_t g = blockIdx.x * kThreads + threadIdx.x; g < plan.groups; g += gridDim.x * kThreads) {
    const int32_t begin = plan.group_start[g], end = plan.group_start[g + 1];
    A sum = 0;
    for (int32_t k = begin; k < end; ++k) {
      const int32_t slice = plan.group_slice[k];
      const A square = slice_sq[slice];
      sum += (squared ? square : sqrt(square)) / sqrt(static_cast<A>(max(1, plan.slice_size[slice])));
    }
    scores[g] = sum / static_cast<A>(max(1, end - begin));
  }
}

std::tuple<Tensor, Tensor> group_saliency(const std::vector<Tensor>& weights, const Tensor& tables,
                                          const Tensor& shapes, const std::vector<int64_t>& layout,
                                          bool squared) {
  constexpr const char* kOp = "group_saliency";
  Work work{};
  work.plan = check_plan(kOp, tables, layout);
  const std::vector<Matrix> matrices = check_weights(kOp, weights, nullptr, tables, shapes, work.plan);
  const torch::stable::accelerator::DeviceGuard guard(tables.get_device_index());
  const cudaStream_t stream = current_stream(kOp, tables);
  const ScalarType dtype = any_double(matrices) ? ScalarType::Double : ScalarType::Float;
  Tensor scores = torch::stable::new_empty(tables, {work.plan.groups}, dtype);
  Sums sums(tables, work.plan, matrices, dtype);
  sums.bind(work);
  for_each_window(work, matrices, [&] {
    if (dtype == ScalarType::Double) {
      launch_cooperative(kOp, saliency_kernel<double>, stream, work, scores.mutable_data_ptr<double>(),
                         squared);
    } else {
      launch_cooperative(kOp, saliency_kernel<float>, stream, work, scores.mutable_data_ptr<float>(),
                         squared);
    }
  });
  return {scores, sums.slice_sq};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("group_saliency", TORCH_BOX(&group_saliency));
}

}  // namespace ocsfast::cuda
