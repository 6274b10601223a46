// How the host starts a kernel over all tensors of a call.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "matrices.cuh"
#include "stream.h"

namespace ocsfast::cuda {

// Memory for the sums, from torch's allocator: reused from call to call, and capturable in a graph.
struct Sums {
  Tensor row_sq, partial, slice_sq;

  Sums(const Tensor& tables, const Plan& plan, const std::vector<Matrix>& matrices, ScalarType dtype)
      : row_sq(torch::stable::new_empty(tables, {plan.num_rows}, dtype)),
        partial(torch::stable::new_empty(tables, {count_partials(matrices)}, dtype)),
        slice_sq(torch::stable::new_empty(tables, {plan.slices}, dtype)) {}

  void bind(Work& work) const {
    work.row_sq = row_sq.mutable_data_ptr();
    work.partial = partial.mutable_data_ptr();
    work.slice_sq = slice_sq.mutable_data_ptr();
  }
};

// Calls launch(work) for all matrices, kMaxTensors at a time: once, but for the largest of models.
template <class Launch>
void for_each_window(Work& work, const std::vector<Matrix>& matrices, const Launch& launch) {
  size_t first = 0;
  do {  // also for no matrix at all: the outputs have to be written
    const size_t end = std::min(matrices.size(), first + kMaxTensors);
    std::copy(matrices.begin() + first, matrices.begin() + end, work.matrix);
    work.first_tensor = static_cast<int32_t>(first);
    work.tensors = static_cast<int32_t>(end - first);
    work.first_task = first < end ? matrices[first].first_task : 0;
    work.tasks =
        first < end ? matrices[end - 1].first_task + matrices[end - 1].tasks - work.first_task : 0;
    work.last = end == matrices.size();
    launch();
    first = end;
  } while (first < matrices.size());
}

template <class... Args>
void launch_cooperative(const char* op, void (*kernel)(Args...), cudaStream_t stream, Args... args) {
  void* pointers[] = {&args...};
  const int blocks = resident_blocks(op, kernel, kThreads);
  check_cuda(op, cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), blocks, kThreads,
                                             pointers, 0, stream));
}

}  // namespace ocsfast::cuda
