#pragma once

#include <torch/headeronly/util/Half.h>

using __half = c10::Half;

inline float __half2float(__half value) {
  return static_cast<float>(value);
}
inline __half __float2half_rn(float value) {
  return __half(value);
}

struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float a, float b) {
  return {__float2half_rn(a), __float2half_rn(b)};
}
