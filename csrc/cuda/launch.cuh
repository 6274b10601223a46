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
  work.row_sums = bound.row_sums.mutable_data_ptr();
  work.partials = bound.partials.mutable_data_ptr();
  work.slice_sq = bound.slice_sq.mutable_data_ptr();
  work.mask = mask;
  work.tensors = bound.plan.tensors;
  work.tasks = bound.tasks;
  work.any_non_float = std::any_of(bound.matrices.begin(), bound.matrices.end(),
                                   [](const Matrix& m) { return m.dtype != DType::kFloat; });
  work.last_launch = true;
  return work;
}

// Calls launch() for up to max_tensors tensors at a time: once, except for the largest models. It is
// called once for no tensors too, since the outputs have to be written.
template <class Launch>
void for_each_window(Work& work, const Bound& bound, size_t max_tensors, const Launch& launch) {
  const auto& matrices = bound.matrices;
  size_t first = 0;
  do {
    const size_t end = std::min(matrices.size(), first + max_tensors);
    work.first_tensor = static_cast<int32_t>(first);
    work.tensors = static_cast<int32_t>(end - first);
    work.first_task = first < end ? matrices[first].first_task : 0;
    work.tasks = (end < matrices.size() ? matrices[end].first_task : bound.tasks) - work.first_task;
    work.last_launch = end == matrices.size();
    launch();
    first = end;
  } while (first < matrices.size());
}

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
  const int wanted = std::max({1, work.tasks, work.plan.slices / kThreads});
  const int blocks = std::min(wanted, resident_blocks(op, kernel, kThreads));
  launch(op, kernel, blocks, kThreads, true, stream, args...);
}

}  // namespace ocsfast::cuda
