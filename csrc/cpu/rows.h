// Row kernels: the loops over elements. They are compiled once for each instruction set
// (rows_<isa>.cpp), and the best that the machine has is chosen when the first one is called (rows.cpp).
// All compute in the same number of lanes and without fused multiply-adds, so they all give the same
// bits.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../criteria.h"

namespace ocsfast::cpu {

// The type in which an element of type T is computed.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename Accumulator<T>::type;

// Elements first .. last - 1 of a band.
struct Span {
  int64_t first, last;
};

// The most tensors an optimizer keeps like each weight.
constexpr int kMaxStates = 2;

// What a row kernel walks: `count` bands of a matrix (matrix.h), and which of their elements the op
// touches. In a pruned band it touches all elements, in any other those in `spans`.
template <class T>
struct Bands {
  using A = accumulator_t<T>;
  T* w;  // [count, width]
  T* grad;
  T* state[kMaxStates];  // an optimizer's
  const T* other;        // the tensor that a criterion needs besides the weight
  int64_t count, width;
  bool touches_all;       // all elements of all bands are touched
  const uint8_t* pruned;  // [count] 0 or 1; null: there is no penalty
  const Span* spans;
  int64_t num_spans;
  const uint8_t* pruned_cols;  // [width + 16] 0 or 1, for the element's column; null: none is pruned
  A factor;                    // Eq. 9, for each pruned slice that contains the element
  const A* slope;              // [count] Eq. 8: λ / ‖slice‖ of the band's row, or 0
  const A* slopes;             // [width] the same of the element's column; null: none is pruned
  double* band_sums;           // [count] out
  A* col_sums;                 // [width] is added to; null: is not wanted
};

// momentum = scalars.momentum * momentum + gain * gradient;
// w -= lr * momentum, or with `nesterov` lr * (gradient + scalars.momentum * momentum), or without
// momentum lr * gradient.
template <class A>
struct SgdScalars {
  A lr, momentum, gain, weight_decay;
  A multiplier;  // of gradients
  bool nesterov;
  bool begins;  // the momentum holds nothing yet
};

// average = beta1 * average + gain1 * gradient; square = beta2 * square + gain2 * gradient ** 2;
// w = decay * w - rate * average / (scale * sqrt(square) + eps).
template <class A>
struct AdamwScalars {
  A beta1, gain1, beta2, gain2, decay, rate, scale, eps;
  A multiplier;  // of gradients
};

template <class T>
struct RowKernels {
  using A = accumulator_t<T>;
  // Sums what a criterion takes from each element, over bands and over columns.
  void (*score)(const Bands<T>& b, Element element);
  // Eq. 9: w *= factor, once for each pruned slice. Sums the new squares of what it touched.
  void (*shrink)(const Bands<T>& b);
  // Eq. 8: grad += w * slope. Where the slope is 0 the gradient stays as it is, even if the weight is
  // infinite.
  void (*lasso)(const Bands<T>& b);
  // An optimizer's step; with a penalty, Eq. 8 before it, Eq. 9 after it, and sums of the new squares.
  void (*sgd)(const Bands<T>& b, const SgdScalars<A>& scalars);
  void (*adamw)(const Bands<T>& b, const AdamwScalars<A>& scalars);
  // sums[c] += the sum of values[c * run : (c + 1) * run], or takes the largest of them and of sums[c].
  // begins: sums[c] counts as 0.
  void (*fold)(const A* values, int64_t cols, int64_t run, double* sums, bool largest, bool begins);
  // values[s] = the score of a slice of sizes[s] elements whose elements sum to sums[s].
  void (*finish)(Finish how, const double* sums, const int32_t* sizes, int64_t n, double* values);
};

template <class T>
const RowKernels<T>& row_kernels();

}  // namespace ocsfast::cpu
