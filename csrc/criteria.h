// The criteria that score a slice: what is taken of each element, which is summed over the slice, and
// how the sum becomes the slice's score. A group's score is the mean over its slices. Host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <string_view>

#include "plan.h"

namespace ocsfast {

// What is taken of an element w. x is the element in its place of another tensor: the gradient, or the
// optimizer's moving average of the gradient or of its square.
enum class Element : uint8_t {
  kSquare,          // w^2
  kAbsolute,        // |w|
  kLargest,         // |w|, and the largest is taken instead of the sum
  kProduct,         // w x
  kSquaredProduct,  // (w x)^2
  kWeighted,        // w^2 x
};

// How the sum over a slice of n elements becomes its score.
enum class Finish : uint8_t {
  kRootMeanSquare,  // sqrt(sum / n)
  kSquareOverRoot,  // sum / sqrt(n)
  kMean,            // sum / n
  kUnchanged,       // sum
  kAbsolute,        // |sum|
  kHalf,            // sum / 2
};

struct Criterion {
  std::string_view name;
  Element element;
  Finish finish;
  bool needs_other;
};

// By the names that `Config.criterion` takes.
constexpr Criterion kCriteria[] = {
    {"l2", Element::kSquare, Finish::kRootMeanSquare, false},          // Eq. 2
    {"l2_squared", Element::kSquare, Finish::kSquareOverRoot, false},  // the authors' code
    {"l1", Element::kAbsolute, Finish::kMean, false},
    {"linf", Element::kLargest, Finish::kUnchanged, false},
    {"taylor", Element::kProduct, Finish::kAbsolute, true},        // |sum w g|
    {"taylor_state", Element::kProduct, Finish::kAbsolute, true},  // |sum w m|
    {"obd", Element::kSquaredProduct, Finish::kHalf, true},        // sum w^2 g^2 / 2
    {"obd_state", Element::kWeighted, Finish::kHalf, true},        // sum w^2 v / 2
};

constexpr Criterion kL2 = kCriteria[0];

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
