// The walk that sums what a criterion takes from each element. Eq. 8 needs one of these sums too: the
// squares.
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
  using Reduce = std::conditional_t<kElement == Element::kLargest, Largest, Sum>;
  static constexpr int kOperands = needs_other(kElement) ? 2 : 1;
  // Four 16-byte loads of a thread are in flight, whether from one tensor or from two.
  static constexpr int kUnroll = 4 / kOperands;
  static constexpr uint32_t kWrites = 0;
  static constexpr bool kPenalized = false, kSparse = false, kSums = true;

  const PointerTable<>* others;  // null where the element needs no other tensor

  template <class T>
  struct Body {
    T* operand[kOperands];

    template <class C>
    __device__ C change(T (&element)[kOperands], SlicePenalty<C>, SlicePenalty<C>) const {
      const C w = to_number(element[0]), x = to_number(element[kOperands - 1]);
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
  __device__ SlicePenalty<A> penalty(const Work&, int32_t) const {
    return {};
  }
  // Whether the tensor has all that the element needs.
  __device__ bool has_operands(const Work& work, int32_t tensor) const {
    if constexpr (needs_other(kElement)) return (*others)(work, tensor);
    return true;
  }
  __device__ bool walks(const Work& work, int32_t tensor) const {
    return has_slices(work.matrices[tensor]) && has_operands(work, tensor);
  }
  template <class T>
  __device__ Body<T> body(const Work& work, int32_t tensor) const {
    Body<T> body;
    body.operand[0] = get_weight<T>(work, tensor);
    if constexpr (kOperands > 1) body.operand[1] = static_cast<T*>((*others)(work, tensor));
    return body;
  }
};

// Writes all slices' sums of squares to work.slice_sq, where the whole grid can read them afterwards.
// The whole grid calls it.
template <class A>
__device__ void compute_squares(const Work& work, Shared<A>& shared) {
  const auto grid = cooperative_groups::this_grid();
  walk<A>(work, Score<Element::kSquare>{}, shared);
  grid.sync();
  gather_slices<Sum, A>(
      work, false, [](int32_t) { return true; }, static_cast<A*>(work.slice_sq),
      static_cast<A*>(nullptr));
  grid.sync();
}

}  // namespace ocsfast::cuda
