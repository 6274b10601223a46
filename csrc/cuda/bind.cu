#include "launch.cuh"

namespace ocsfast::cuda {
namespace {

// Copies a table to the device of `like`, as bytes.
template <class Entry>
Tensor copy_to_device(const char* op, const std::vector<Entry>& table, const Tensor& like,
                      cudaStream_t stream) {
  const auto bytes = static_cast<int64_t>(table.size() * sizeof(Entry));
  Tensor there = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  check_cuda(op, cudaMemcpyAsync(there.mutable_data_ptr(), table.data(), bytes, cudaMemcpyHostToDevice,
                                 stream));
  return there;
}

Tensor bind(const std::vector<Tensor>& weights, const Tensor& tables, const Tensor& shapes,
            const std::vector<int64_t>& layout) {
  constexpr const char* kOp = "bind";
  const OnDevice here(kOp, tables);
  if (is_capturing(kOp, here.stream())) {
    fail(kOp, "a plan cannot be bound while a CUDA graph is captured: take one step before the capture");
  }
  const std::shared_ptr<Bound> bound = make_bound(weights, tables, shapes, layout, Backend::kCuda);
  bound->bias_corrections =
      torch::stable::new_empty(tables, {bound->plan.tensors, 2}, ScalarType::Double);
  std::vector<Task> tasks(bound->tasks);
  for (int32_t i = 0; i < bound->tasks; ++i)
    tasks[i] = find_task(bound->matrices.data(), bound->plan.tensors, i);
  bound->device_matrices = copy_to_device(kOp, bound->matrices, tables, here.stream());
  bound->device_tasks = copy_to_device(kOp, tasks, tables, here.stream());
  check_cuda(kOp, cudaStreamSynchronize(here.stream()));  // ops may run on other streams
  bound->pending = std::make_unique<Streams>(tables.get_device_index(), here.stream());
  return issue_ticket(bound, shapes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("bind", TORCH_BOX(&bind));
}

}  // namespace ocsfast::cuda
