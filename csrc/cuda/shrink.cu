#include "launch.cuh"

namespace ocsfast::cuda {
namespace {

template <class T>
__device__ void shrink_task(const Work& work, const Task& task) {
  using A = typename Accumulator<T>::type;
  const Matrix& m = work.matrix[task.tensor];
  const A once = static_cast<A>(*work.scalar), twice = once * once;
  const bool any_col = any_col_pruned(work, m);
  const auto col_pruned = [&](uint32_t j) {
    return any_col && slice_pruned(work, work.plan.col_slice[m.col_base + j / m.run]);
  };
  for_each_batch(
      m, task, [&](int32_t row) { return row_pruned(work, m, row); }, col_pruned,
      [&](bool row, const bool (&col)[kBatch], int64_t first, int count) {
        if (!row && !any_col) return;
        T* w = static_cast<T*>(m.weight) + first;
        T value[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (k < count && (row || col[k])) value[k] = w[k * kWarp];
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (k < count && (row || col[k])) {
            w[k * kWarp] = from_number<T>(to_number<A>(value[k]) * (row && col[k] ? twice : once));
          }
        }
      });
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    shrink_kernel(const __grid_constant__ Work work) {
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
