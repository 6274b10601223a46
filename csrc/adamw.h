// What AdamW's averages are corrected by: they began at 0. Host and device.
#pragma once

#include <cmath>

#include "plan.h"

namespace ocsfast {

struct Correction {
  double average;      // 1 / (1 - beta1 ** steps)
  double root_square;  // 1 / sqrt(1 - beta2 ** steps)
};

OCSFAST_HOST_DEVICE inline Correction correction_of(double beta1, double beta2, double steps) {
  return {1 / (1 - pow(beta1, steps)), 1 / sqrt(1 - pow(beta2, steps))};
}

}  // namespace ocsfast
