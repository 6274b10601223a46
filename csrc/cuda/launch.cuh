// How the host starts a kernel over the weights of a plan.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "runtime.h"
#include "work.cuh"

namespace ocsfast::cuda {

// For a launch over all tensors. mask: null prunes nothing.
inline Work make_work(const Bound& bound, const bool* mask) {
  Work work{};
  work.plan = bound.plan;
  work.matrices = static_cast<const Matrix*>(bound.device_matrices.const_data_ptr());
  work.tasks = static_cast<const Task*>(bound.device_tasks.const_data_ptr());
  work.row_sums = bound.row_sums.mutable_data_ptr();
  work.partials = bound.partials.mutable_data_ptr();
  work.slice_sq = bound.slice_sq.mutable_data_ptr();
  work.mask = mask;
  return work;
}

// An element type, and the type in which sums are kept.
template <class T_, class A_>
struct Types {
  using T = T_;
  using A = A_;
};

// Calls f(Types<T, A>).
template <class F>
void with_types(DType dtype, bool in_double, const F& f) {
  switch (dtype) {
    case DType::kFloat:
      return in_double ? f(Types<float, double>{}) : f(Types<float, float>{});
    case DType::kHalf:
      return in_double ? f(Types<__half, double>{}) : f(Types<__half, float>{});
    case DType::kBFloat16:
      return in_double ? f(Types<__nv_bfloat16, double>{}) : f(Types<__nv_bfloat16, float>{});
    case DType::kDouble:
      return f(Types<double, double>{});
  }
}

// Calls launch(Types) for up to max_tensors tensors at a time and for each element type that they have:
// once, unless types are mixed, or for the largest models. It is called once for no tensors too, since
// the outputs have to be written.
template <class Launch>
void for_each_launch(Work& work, const Bound& bound, size_t max_tensors, const Launch& launch) {
  const std::vector<Matrix>& matrices = bound.matrices;
  size_t first = 0;
  do {
    const size_t end = std::min(matrices.size(), first + max_tensors);
    work.first_tensor = static_cast<int32_t>(first);
    work.tensors = static_cast<int32_t>(end - first);
    work.first_task = first < end ? matrices[first].first_task : 0;
    work.num_tasks = (end < matrices.size() ? matrices[end].first_task : bound.tasks) - work.first_task;
    std::vector<DType> dtypes;
    for (size_t t = first; t < end; ++t) {
      if (std::find(dtypes.begin(), dtypes.end(), matrices[t].dtype) == dtypes.end())
        dtypes.push_back(matrices[t].dtype);
    }
    if (dtypes.empty()) dtypes.push_back(DType::kFloat);
    for (const DType& dtype : dtypes) {
      work.gathers = &dtype == &dtypes.back();
      work.last_launch = work.gathers && end == matrices.size();
      with_types(dtype, bound.any_double, launch);
    }
    first = end;
  } while (first < matrices.size());
}

// Writes the slices' sums of squares to Bound::slice_sq, ahead of an op that needs them.
void launch_squares(const char* op, const Bound& bound, cudaStream_t stream);

// Copies the pointers of this launch's tensors.
template <int kTensors>
void copy_pointers(const Work& work, const std::vector<void*>& all, PointerTable<kTensors>& table) {
  std::copy_n(all.begin() + work.first_tensor, work.tensors, table.pointer);
}

// Starts a block for each task, but no more than are resident at once: a block takes task after task. A
// small model gets fewer blocks than fit, because all of them take part in the barriers of the grid.
template <class... Args>
void launch_cooperative(const char* op, void (*kernel)(Args...), const Work& work, cudaStream_t stream,
                        const std::common_type_t<Args>&... args) {
  const int wanted = std::max({1, work.num_tasks, work.plan.slices / kThreads});
  const int blocks = std::min(wanted, resident_blocks(op, kernel, kThreads));
  launch(op, kernel, blocks, kThreads, true, stream, args...);
}

}  // namespace ocsfast::cuda
