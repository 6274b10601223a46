// Takes the place of torch's header, whose DeviceGuard needs an accelerator.
#pragma once

#define DeviceGuard TorchsDeviceGuard
#include_next <torch/csrc/stable/accelerator.h>
#undef DeviceGuard

namespace torch::stable::accelerator {

class DeviceGuard {
 public:
  explicit DeviceGuard(DeviceIndex) {}
};

}  // namespace torch::stable::accelerator
