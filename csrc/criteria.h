// How a slice is scored: what each element adds, how these are put together, and what the slice's score
// is then. A group's score is the mean over its slices. Host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <string_view>

#include "plan.h"

namespace ocsfast {

// What an element w adds, x being the one in its place of another tensor: a gradient, or the optimizer's
// moving average of it or of its square.
enum class Element : uint8_t { kSquare, kAbsolute, kLargest, kProduct, kSquaredProduct, kWeighted };

enum class Finish : uint8_t { kRootMeanSquare, kSquareOverRoot, kMean, kItself, kAbsolute, kHalf };

struct Criterion {
  std::string_view name;
  Element element;
  Finish finish;
  bool needs_other;
};

// The names of `Config.criterion`.
constexpr Criterion kCriteria[] = {
    {"l2", Element::kSquare, Finish::kRootMeanSquare, false},          // Eq. 2
    {"l2_squared", Element::kSquare, Finish::kSquareOverRoot, false},  // the authors' code
    {"l1", Element::kAbsolute, Finish::kMean, false},
    {"linf", Element::kLargest, Finish::kItself, false},
    {"taylor", Element::kProduct, Finish::kAbsolute, true},        // |sum w g|
    {"taylor_state", Element::kProduct, Finish::kAbsolute, true},  // |sum w m|
    {"obd", Element::kSquaredProduct, Finish::kHalf, true},        // sum w^2 g^2 / 2
    {"obd_state", Element::kWeighted, Finish::kHalf, true},        // sum w^2 v / 2
};

template <Finish kFinish, class Number>
OCSFAST_HOST_DEVICE inline Number finish_slice(Number sum, int32_t size) {
  const Number elements = static_cast<Number>(size > 1 ? size : 1);
  if constexpr (kFinish == Finish::kRootMeanSquare) {
    return sqrt(sum / elements);
  } else if constexpr (kFinish == Finish::kSquareOverRoot) {
    return sum / sqrt(elements);
  } else if constexpr (kFinish == Finish::kMean) {
    return sum / elements;
  } else if constexpr (kFinish == Finish::kAbsolute) {
    return sum < 0 ? -sum : sum;
  } else if constexpr (kFinish == Finish::kHalf) {
    return sum / 2;
  } else {
    return sum;
  }
}

}  // namespace ocsfast
