// The sums that criteria and Eq. 8 take of the weights.
#pragma once

#include "../criteria.h"
#include "walk.cuh"

namespace ocsfast::cuda {

constexpr bool needs_other(Element element) {
  return element == Element::kProduct || element == Element::kSquaredProduct ||
         element == Element::kWeighted;
}

template <Element kElement>
struct Score {
  using Join = std::conditional_t<kElement == Element::kLargest, Largest, Add>;
  static constexpr int kStreams = needs_other(kElement) ? 2 : 1;
  static constexpr int kUnroll = 4 / kStreams;
  static constexpr uint32_t kWrites = 0;
  static constexpr bool kPenalized = false, kSparse = false, kSums = true;

  const Beside<>* others;  // where the element needs them

  template <class T>
  struct Step {
    T* stream[kStreams];

    template <class C>
    __device__ C change(T (&element)[kStreams], Label<C>, Label<C>) const {
      const C w = to_number(element[0]), x = to_number(element[kStreams - 1]);
      if constexpr (kElement == Element::kSquare) {
        return w * w;
      } else if constexpr (kElement == Element::kAbsolute || kElement == Element::kLargest) {
        return w < 0 ? -w : w;
      } else if constexpr (kElement == Element::kProduct) {
        return w * x;
      } else if constexpr (kElement == Element::kSquaredProduct) {
        return (w * x) * (w * x);
      } else {
        return w * w * x;
      }
    }
  };

  template <class A>
  __device__ Label<A> label(const Work&, int32_t) const {
    return {};
  }
  __device__ bool has(const Work& work, int32_t tensor) const {
    if constexpr (needs_other(kElement)) return (*others)(work, tensor);
    return true;
  }
  __device__ bool walks(const Work& work, int32_t tensor) const {
    return has_slices(work.matrices[tensor]) && has(work, tensor);
  }
  template <class T>
  __device__ Step<T> start(const Work& work, int32_t tensor) const {
    Step<T> step;
    step.stream[0] = weight_of<T>(work, tensor);
    if constexpr (kStreams > 1) step.stream[1] = static_cast<T*>((*others)(work, tensor));
    return step;
  }
};

// All slices' sums of squares, to work.slice_sq, and what else is there to read it. A whole grid calls
// it.
template <class A>
__device__ void take_squares(const Work& work, Shared<A>& shared) {
  const auto grid = cooperative_groups::this_grid();
  walk<A>(work, Score<Element::kSquare>{}, shared);
  grid.sync();
  gather_slices<Add, A>(
      work, false, [](int32_t) { return true; }, static_cast<A*>(work.slice_sq),
      static_cast<A*>(nullptr));
  grid.sync();
}

}  // namespace ocsfast::cuda
