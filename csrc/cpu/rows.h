// The loops over elements, compiled for several instruction sets; the best the machine has is chosen at
// run time. Each computes in a fixed number of lanes and without fused multiply-adds, so that all give
// the same bits.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

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

template <class T>
struct RowKernels {
  using A = accumulator_t<T>;
  // w: [rows, width]. sums[r] = sum of squares of row r; cols[j] += that of column j, unless null.
  void (*square)(const T* w, int64_t rows, int64_t width, double* sums, A* cols);
  // w *= factor
  void (*scale)(T* w, int64_t n, A factor);
  // w *= factors
  void (*scale_by)(T* w, int64_t n, const A* factors);
  // grad += w * factor
  void (*add)(T* grad, const T* w, int64_t n, A factor);
  // grad += w * (factor + factors). Where that is 0, grad stays, even beside an infinite weight.
  void (*add_by)(T* grad, const T* w, int64_t n, A factor, const A* factors);
};

template <class T>
const RowKernels<T>& row_kernels();

}  // namespace ocsfast::cpu
