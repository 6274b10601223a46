// The loops over elements, compiled for several instruction sets; the best the machine has is chosen at
// run time. Each computes in a fixed number of lanes and without fused multiply-adds, so that all give
// the same bits.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../criteria.h"

namespace ocsfast::cpu {

// The type a weight of type T is computed in.
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

// Tensors an optimizer keeps beside each weight, at most.
constexpr int kMostStates = 2;

// What a kernel walks: some bands of a tensor, and what is known of each band and of each element in it.
// Where a band is pruned, all of it is touched; else `spans` of it are.
template <class T>
struct Bands {
  using A = accumulator_t<T>;
  T* w;  // [count, width]
  T* grad;
  T* state[kMostStates];  // an optimizer's
  const T* other;         // beside w, for a criterion
  int64_t count, width;
  bool dense;             // all of every band is touched
  const uint8_t* pruned;  // [count]; null: there is no penalty
  const Span* spans;
  int64_t num_spans;
  const uint8_t* pruned_cols;  // [width + 16] whether the element's column is pruned; null: none is
  A factor;                    // Eq. 9: of whatever is pruned
  const A* slope;              // [count] Eq. 8: strength / |slice| of the band, or 0
  const A* slopes;             // [width] the same of the element's column, where any is pruned
  double* band_sums;           // [count] out
  A* col_sums;                 // [width] added to, unless null
};

// momentum = decay * momentum + gain * gradient; w -= lr * momentum, or with `nesterov`
// lr * (gradient + decay * momentum), or without a momentum lr * gradient.
template <class A>
struct SgdStep {
  A lr, decay, gain, weight_decay, sign;  // sign: -1 to maximize
  bool nesterov;
  bool begins;  // the momentum holds nothing yet
};

// average = beta1 * average + gain1 * gradient; square = beta2 * square + gain2 * gradient ** 2;
// w = keep * w - rate * average / (scale * sqrt(square) + eps).
template <class A>
struct AdamwStep {
  A beta1, gain1, beta2, gain2, keep, rate, scale, eps, sign;
};

template <class T>
struct RowKernels {
  using A = accumulator_t<T>;
  // Sums of what a criterion takes from each element, over bands and over columns.
  void (*score)(const Bands<T>& b, Element element);
  // w *= factors; sums of the new squares of what was touched
  void (*shrink)(const Bands<T>& b);
  // grad += w * slopes. Where the slope is 0, grad stays, even beside an infinite weight.
  void (*lasso)(const Bands<T>& b);
  // An optimizer's step; with a penalty Eq. 8 before and Eq. 9 after it, and sums of the new squares.
  void (*sgd)(const Bands<T>& b, const SgdStep<A>& step);
  void (*adamw)(const Bands<T>& b, const AdamwStep<A>& step);
  // sums[c] += sum of values[c * run : (c + 1) * run], or the largest of them all; `begins`: from 0
  void (*fold)(const A* values, int64_t cols, int64_t run, double* sums, bool largest, bool begins);
  // values[s] = what a slice of sizes[s] elements scores whose elements add up to sums[s]
  void (*finish)(Finish how, const double* sums, const int32_t* sizes, int64_t n, double* values);
};

template <class T>
const RowKernels<T>& row_kernels();

}  // namespace ocsfast::cpu
