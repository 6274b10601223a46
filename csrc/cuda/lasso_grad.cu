#include "launch.cuh"

namespace ocsfast::cuda {
namespace {

template <class T, class A>
__device__ void lasso_task(const Work& work, const Task& task) {
  const Matrix& m = work.matrix[task.tensor];
  if (!m.grad) return;
  const A* slice_factor = static_cast<const A*>(work.slice_sq);
  const bool any_col = any_col_pruned(work, m);
  const auto factor_of = [&](int32_t slice) {
    return slice_pruned(work, slice) ? slice_factor[slice] : A(0);
  };
  for_each_batch(
      m, task,
      [&](int32_t row) {
        return m.row_base >= 0 ? factor_of(work.plan.row_slice[m.row_base + row]) : A(0);
      },
      [&](uint32_t j) {
        return any_col ? factor_of(work.plan.col_slice[m.col_base + j / m.run]) : A(0);
      },
      [&](A row, const A(&col)[kBatch], int64_t first, int count) {
        if (row == A(0) && !any_col) return;
        const T* w = static_cast<const T*>(m.weight) + first;
        T* grad = static_cast<T*>(m.grad) + first;
        T value[kBatch], slope[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (k < count && row + col[k] != A(0)) {
            value[k] = w[k * kWarp];
            slope[k] = grad[k * kWarp];
          }
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (k < count && row + col[k] != A(0)) {
            grad[k * kWarp] =
                from_number<T>(to_number<A>(slope[k]) + to_number<A>(value[k]) * (row + col[k]));
          }
        }
      });
}

template <class A>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    lasso_kernel(const __grid_constant__ Work work) {
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
