#include "launch.cuh"

namespace ocsfast::cuda {
namespace {

Tensor bind(const std::vector<Tensor>& weights, const Tensor& tables, const Tensor& shapes,
            const std::vector<int64_t>& layout) {
  constexpr const char* kOp = "bind";
  const OnDevice here(kOp, tables);
  if (is_capturing(kOp, here.stream())) {
    fail(kOp, "a plan cannot be bound while a CUDA graph is captured: take one step before the capture");
  }
  const std::shared_ptr<Bound> bound = make_bound(weights, tables, shapes, layout, Backend::kCuda);
  const auto bytes = static_cast<int64_t>(bound->matrices.size() * sizeof(Matrix));
  bound->device_matrices = torch::stable::new_empty(tables, {bytes}, ScalarType::Byte);
  bound->bias_corrections =
      torch::stable::new_empty(tables, {bound->plan.tensors, 2}, ScalarType::Double);
  check_cuda(kOp, cudaMemcpyAsync(bound->device_matrices.mutable_data_ptr(), bound->matrices.data(),
                                  bytes, cudaMemcpyHostToDevice, here.stream()));
  check_cuda(kOp, cudaStreamSynchronize(here.stream()));  // ops may run on other streams
  bound->pending = std::make_unique<Streams>(tables.get_device_index(), here.stream());
  return issue_ticket(bound, shapes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("bind", TORCH_BOX(&bind));
}

}  // namespace ocsfast::cuda
