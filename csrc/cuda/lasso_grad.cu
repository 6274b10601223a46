#include "launch.cuh"

namespace ocsfast::cuda {
namespace {

template <class T, class A>
__device__ void lasso_task(const Work& work, const Task& task) {
  const Matrix& m = work.matrix[task.tensor];
  if (!m.grad) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool any_col = any_col_pruned(work, m);
  const A* slice_factor = static_cast<const A*>(work.slice_sq);
  for (int32_t row = task.first_row + warp; row < task.last_row; row += kWarps) {
    const bool pruned = row_pruned(work, m, row);
    if (!pruned && !any_col) continue;
    const A row_factor = pruned ? slice_factor[work.plan.row_slice[m.row_base + row]] : A(0);
    for (int32_t band = 0; band < m.bands; ++band) {
      const int64_t first = (static_cast<int64_t>(row) * m.bands + band) * m.width;
      const T* w = static_cast<const T*>(m.weight) + first;
      T* grad = static_cast<T*>(m.grad) + first;
      for (int32_t j = lane; j < m.width; j += kWarp) {
        A factor = row_factor;
        if (any_col) {
          const int32_t slice = work.plan.col_slice[m.col_base + j / m.run];
          if (slice_pruned(work, slice)) factor += slice_factor[slice];
        }
        if (factor != A(0))
          grad[j] = from_number<T>(to_number<A>(grad[j]) + to_number<A>(w[j]) * factor);
      }
    }
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) lasso_kernel(const __grid_constant__ Work work) {
  const auto grid = cooperative_groups::this_grid();
  slice_squares<A>(work, grid);
  grid.sync();
  // Norms to factors, in place.
  const A strength = static_cast<A>(*work.scalar);
  A* slice_sq = static_cast<A*>(work.slice_sq);
  for (int32_t s = blockIdx.x * kThreads + threadIdx.x; s < work.plan.slices;
       s += gridDim.x * kThreads) {
    const int32_t t = work.plan.slice_tensor[s] - work.first_tensor;
    if (t < 0 || t >= work.tensors || !slice_pruned(work, s)) continue;
    slice_sq[s] = slice_sq[s] == A(0) ? A(0) : strength / sqrt(slice_sq[s]);
  }
  grid.sync();
  for (int32_t task = work.first_task + blockIdx.x; task < work.first_task + work.tasks;
       task += gridDim.x) {
    const Task found = find_task(work, task);
    dispatch(work.matrix[found.tensor].dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if constexpr (std::is_same_v<T, double>) {
        if constexpr (std::is_same_v<A, double>) lasso_task<T, A>(work, found);
      } else {
        lasso_task<T, A>(work, found);
      }
    });
  }
}

void lasso_grad(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                const Tensor& tables, const Tensor& shapes, const std::vector<int64_t>& layout,
                const Tensor& mask, const Tensor& strength) {
  constexpr const char* kOp = "lasso_grad_";
  Work work{};
  work.plan = check_plan(kOp, tables, layout);
  const std::vector<Matrix> matrices = check_weights(kOp, weights, &grads, tables, shapes, work.plan);
  check_array(kOp, mask, {"mask", ScalarType::Bool, work.plan.groups, 1}, tables);
  check_array(kOp, strength, {"strength", ScalarType::Float, 1, 0}, tables);
  const torch::stable::accelerator::DeviceGuard guard(tables.get_device_index());
  const cudaStream_t stream = current_stream(kOp, tables);
  const ScalarType dtype = any_double(matrices) ? ScalarType::Double : ScalarType::Float;
  const Sums sums(tables, work.plan, matrices, dtype);
  sums.bind(work);
  work.mask = mask.const_data_ptr<bool>();
  work.scalar = strength.const_data_ptr<float>();
  work.with_grad_only = true;
  for_each_window(work, matrices, [&] {
    launch_cooperative(kOp, dtype == ScalarType::Double ? lasso_kernel<double> : lasso_kernel<float>,
                       stream, work);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("lasso_grad_", TORCH_BOX(&lasso_grad));
}

}  // namespace ocsfast::cuda
