// AdamW's bias correction: the averages start at 0 and are divided by what that leaves out. Host and
// device.
#pragma once

#include <cmath>

#include "plan.h"

namespace ocsfast {

// Factors of the average and of the root of the average square.
struct BiasCorrection {
  double average;      // 1 / (1 - beta1 ** steps)
  double root_square;  // 1 / sqrt(1 - beta2 ** steps)
};

OCSFAST_HOST_DEVICE inline BiasCorrection bias_correction(double beta1, double beta2, double steps) {
  return {1 / (1 - pow(beta1, steps)), 1 / sqrt(1 - pow(beta2, steps))};
}

}  // namespace ocsfast
