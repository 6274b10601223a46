// Stands for torch's header, whose guard asks for an accelerator.
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
