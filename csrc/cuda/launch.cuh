// How the host starts a kernel over the weights of a plan.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "runtime.h"
#include "walk.cuh"

namespace ocsfast::cuda {

// For a launch over all tensors.
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
  work.others_than_float = std::any_of(bound.matrices.begin(), bound.matrices.end(),
                                       [](const Matrix& m) { return m.dtype != DType::kFloat; });
  work.last = true;
  return work;
}

// Calls launch() with the work of `most` tensors at a time: once, but for the largest of models.
template <class Launch>
void for_each_window(Work& work, const Bound& bound, size_t most, const Launch& launch) {
  const auto& matrices = bound.matrices;
  size_t first = 0;
  do {  // also for no tensor at all: the outputs have to be written
    const size_t end = std::min(matrices.size(), first + most);
    work.first_tensor = static_cast<int32_t>(first);
    work.tensors = static_cast<int32_t>(end - first);
    work.first_task = first < end ? matrices[first].first_task : 0;
    work.tasks = (end < matrices.size() ? matrices[end].first_task : bound.tasks) - work.first_task;
    work.last = end == matrices.size();
    launch();
    first = end;
  } while (first < matrices.size());
}

// The pointers of the tensors of a window.
template <int kTensors>
void copy_pointers(const Work& work, const std::vector<void*>& all, Beside<kTensors>& beside) {
  std::copy_n(all.begin() + work.first_tensor, work.tensors, beside.pointer);
}

// With as many blocks as there is work for, of those that fit on the device at once.
template <class... Args>
void launch_cooperative(const char* op, void (*kernel)(Args...), const Work& work, cudaStream_t stream,
                        const std::common_type_t<Args>&... args) {
  const int wanted = std::max({1, work.tasks, work.plan.slices / kThreads});
  const int blocks = std::min(wanted, resident_blocks(op, kernel, kThreads));
  launch(op, kernel, blocks, kThreads, true, stream, args...);
}

}  // namespace ocsfast::cuda
