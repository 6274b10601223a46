#include "launch.cuh"

namespace ocsfast::cuda {
namespace {

template <class T>
__device__ void shrink_task(const Work& work, const Task& task) {
  using A = typename Accumulator<T>::type;
  const Matrix& m = work.matrix[task.tensor];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool any_col = any_col_pruned(work, m);
  const A once = static_cast<A>(*work.scalar), twice = once * once;
  for (int32_t row = task.first_row + warp; row < task.last_row; row += kWarps) {
    const bool pruned = row_pruned(work, m, row);
    if (!pruned && !any_col) continue;
    for (int32_t band = 0; band < m.bands; ++band) {
      T* w = static_cast<T*>(m.weight) + (static_cast<int64_t>(row) * m.bands + band) * m.width;
      for (int32_t j = lane; j < m.width; j += kWarp) {
        const bool col = any_col && slice_pruned(work, work.plan.col_slice[m.col_base + j / m.run]);
        if (pruned || col) w[j] = from_number<T>(to_number<A>(w[j]) * (pruned && col ? twice : once));
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) shrink_kernel(const __grid_constant__ Work work) {
  for (int32_t task = work.first_task + blockIdx.x; task < work.first_task + work.tasks;
       task += gridDim.x) {
    const Task found = find_task(work, task);
    dispatch(work.matrix[found.tensor].dtype,
             [&](auto* type) { shrink_task<std::remove_pointer_t<decltype(type)>>(work, found); });
  }
}

void shrink(const std::vector<Tensor>& weights, const Tensor& tables, const Tensor& shapes,
            const std::vector<int64_t>& layout, const Tensor& mask, const Tensor& factor) {
  constexpr const char* kOp = "shrink_";
  Work work{};
  work.plan = check_plan(kOp, tables, layout);
  const std::vector<Matrix> matrices = check_weights(kOp, weights, nullptr, tables, shapes, work.plan);
  check_array(kOp, mask, {"mask", ScalarType::Bool, work.plan.groups, 1}, tables);
  check_array(kOp, factor, {"factor", ScalarType::Float, 1, 0}, tables);
  const torch::stable::accelerator::DeviceGuard guard(tables.get_device_index());
  const cudaStream_t stream = current_stream(kOp, tables);
  work.mask = mask.const_data_ptr<bool>();
  work.scalar = factor.const_data_ptr<float>();
  const int resident = resident_blocks(kOp, shrink_kernel, kThreads);
  for_each_window(work, matrices, [&] {
    if (work.tasks == 0) return;
    shrink_kernel<<<std::min(resident, work.tasks), kThreads, 0, stream>>>(work);
    check_cuda(kOp, cudaGetLastError());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("shrink_", TORCH_BOX(&shrink));
}

}  // namespace ocsfast::cuda
