// The walk that sums what a criterion takes from each element.
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
  // Two 16-byte loads at a time, whether from one tensor or from two, and two ahead.
  static constexpr int kRows = 2 / kOperands;
  static constexpr uint32_t kWrites = 0;
  static constexpr bool kPenalized = false, kSparse = false, kSums = true;
  static constexpr int kBlocksInFloat = 3, kBlocksInHalf = 3;
  static constexpr bool kUnrollBand = true;

  const PointerTable<>* others;  // null where the element needs no other tensor

  template <class T>
  struct Body {
    T* operand[kOperands];

    template <class C, int kCount>
    __device__ void change(Pack<T, kCount> (&packs)[kOperands], SlicePenalty<C>,
                           const ColumnPenalties<C, kCount>&, C (&terms)[kCount]) const {
      C weights[kCount], others[kCount];
      unpack(packs[0], weights);
      unpack(packs[kOperands - 1], others);
#pragma unroll
      for (int k = 0; k < kCount; ++k) terms[k] = term(weights[k], others[k]);
    }

    template <class C>
    static __device__ C term(C w, C x) {
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

}  // namespace ocsfast::cuda
