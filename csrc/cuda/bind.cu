#include "launch.cuh"

namespace ocsfast::cuda {
namespace {

Tensor bind(const std::vector<Tensor>& weights, const Tensor& tables, const Tensor& shapes,
            const std::vector<int64_t>& layout) {
  constexpr const char* kOp = "bind";
  const torch::stable::accelerator::DeviceGuard guard(tables.get_device_index());
  const std::shared_ptr<Bound> bound = make_bound(weights, tables, shapes, layout, ScalarType::Float);
  const auto bytes = static_cast<int64_t>(bound->matrices.size() * sizeof(Matrix));
  bound->device = torch::stable::new_empty(tables, {bytes}, ScalarType::Byte);
  const cudaStream_t stream = current_stream(kOp, tables);
  check_cuda(kOp, cudaMemcpyAsync(bound->device.mutable_data_ptr(), bound->matrices.data(), bytes,
                                  cudaMemcpyHostToDevice, stream));
  check_cuda(kOp, cudaStreamSynchronize(stream));  // ops may run on another stream
  return issue_ticket(bound, shapes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("bind", TORCH_BOX(&bind));
}

}  // namespace ocsfast::cuda
