// The bodies of RowKernels. Included by rows_<isa>.cpp, each with its own target, OCSFAST_ISA and
// OCSFAST_HALF_LANES: how many half-precision numbers one instruction converts. No function of std is
// called here, whose templates could be compiled for one machine and linked for another.

#include "lanes.inl.h"
#include "step.inl.h"

namespace ocsfast::cpu::OCSFAST_ISA {
namespace {

// What a criterion takes from an element.
struct Square : Sum {
  static constexpr bool kOther = false;
  template <class V>
  static V of(V w, V) {
    return w * w;
  }
};
struct Absolute : Sum {
  static constexpr bool kOther = false;
  template <class V>
  static V of(V w, V) {
    return w < 0 ? -w : w;
  }
};
struct LargestAbsolute : Largest {
  static constexpr bool kOther = false;
  template <class V>
  static V of(V w, V) {
    return w < 0 ? -w : w;
  }
};
struct Product : Sum {
  static constexpr bool kOther = true;
  template <class V>
  static V of(V w, V x) {
    return w * x;
  }
};
struct SquaredProduct : Sum {
  static constexpr bool kOther = true;
  template <class V>
  static V of(V w, V x) {
    return (w * x) * (w * x);
  }
};
struct Weighted : Sum {
  static constexpr bool kOther = true;
  template <class V>
  static V of(V w, V x) {
    return w * w * x;
  }
};

template <bool kWithCols, class E, class T>
inline void score_all(const Bands<T>& b) {
  using A = accumulator_t<T>;
  using V = typename Lanes<A>::type;
  A* __restrict cols = b.col_sums;
  for_bands<E>(b, [&](int64_t k, int64_t first, int64_t last, V& sum) OCSFAST_INLINE {
    const T* __restrict w = b.w + k * b.width;
    const T* __restrict x = b.other + k * b.width;
    for_lanes<A>(first, last, [=, &sum](int64_t j, auto n) OCSFAST_INLINE {
      fetch(w, j, kAhead);
      const V v = load_n<A>(w + j, n);
      V other = v;
      if constexpr (E::kOther) {
        fetch(x, j, kAhead);
        other = load_n<A>(x + j, n);
      }
      const V element = E::of(v, other);
      sum = E::join(sum, element);
      if constexpr (kWithCols) store_n<A>(cols + j, n, E::join(load_n<A>(cols + j, n), element));
    });
  });
}

template <class T>
void score(const Bands<T>& b, Element element) {
  const auto with = [&](auto e) {
    using E = decltype(e);
    b.col_sums ? score_all<true, E>(b) : score_all<false, E>(b);
  };
  switch (element) {
    case Element::kSquare:
      return with(Square{});
    case Element::kAbsolute:
      return with(Absolute{});
    case Element::kLargest:
      return with(LargestAbsolute{});
    case Element::kProduct:
      return with(Product{});
    case Element::kSquaredProduct:
      return with(SquaredProduct{});
    case Element::kWeighted:
      return with(Weighted{});
  }
}

// kWithCols: column sums are taken; kPruned: and columns are pruned.
template <bool kWithCols, bool kPruned, class T>
inline void shrink_all(const Bands<T>& b) {
  using A = accumulator_t<T>;
  using V = typename Lanes<A>::type;
  const uint8_t* __restrict flags = b.pruned_cols;
  A* __restrict cols = b.col_sums;
  for_touched(b, [&](int64_t k, int64_t first, int64_t last, Run run, V& sum) OCSFAST_INLINE {
    T* __restrict w = b.w + k * b.width;
    const V once = splat<A>(b.factor), own = b.pruned[k] ? once : splat<A>(1);
    for_lanes<A>(first, last, [=, &sum](int64_t j, auto n) OCSFAST_INLINE {
      fetch(w, j, run, kAhead);
      V factor = own;
      if constexpr (kPruned) factor *= where_set<A>(flags + j, once);
      const V now = store_n<A>(w + j, n, load_n<A>(w + j, n) * factor);
      const V square = now * now;
      sum += square;
      if constexpr (kWithCols) store_n<A>(cols + j, n, load_n<A>(cols + j, n) + square);
    });
  });
}

template <class T>
void shrink(const Bands<T>& b) {
  if (!b.col_sums) {
    shrink_all<false, false>(b);
  } else if (!b.pruned_cols) {
    shrink_all<true, false>(b);
  } else {
    shrink_all<true, true>(b);
  }
}

template <bool kWithCols, class T>
inline void lasso_all(const Bands<T>& b) {
  using A = accumulator_t<T>;
  using V = typename Lanes<A>::type;
  const A* __restrict slopes = b.slopes;
  for_touched(b, [&](int64_t k, int64_t first, int64_t last, Run run, V&) OCSFAST_INLINE {
    const T* __restrict w = b.w + k * b.width;
    T* __restrict grad = b.grad + k * b.width;
    const V own = splat<A>(b.slope[k]);
    for_lanes<A>(first, last, [=](int64_t j, auto n) OCSFAST_INLINE {
      fetch(w, j, run, kAheadOfSeveral);
      fetch(grad, j, run, kAheadOfSeveral);
      V slope = own;
      if constexpr (kWithCols) slope += load_n<A>(slopes + j, n);
      const V now = load_n<A>(grad + j, n);
      const V then = now + load_n<A>(w + j, n) * slope;
      store_n<A>(grad + j, n, slope != 0 ? then : now);
    });
  });
}

template <class T>
void lasso(const Bands<T>& b) {
  b.slopes ? lasso_all<true>(b) : lasso_all<false>(b);
}

template <class Join, class A>
inline void fold_as(const A* __restrict values, int64_t cols, int64_t run, double* __restrict sums,
                    bool begins) {
  if (run == 1) {
    if (begins) {
      for (int64_t c = 0; c < cols; ++c) sums[c] = static_cast<double>(values[c]);
    } else {
      for (int64_t c = 0; c < cols; ++c) sums[c] = Join::join(sums[c], static_cast<double>(values[c]));
    }
    return;
  }
  const auto columns = [=](int64_t c, auto count) OCSFAST_INLINE {
    double sum[count] = {};
    for (int k = 0; k < count && !begins; ++k) sum[k] = sums[c + k];
    for (int64_t i = 0; i < run; ++i) {
      for (int k = 0; k < count; ++k)
        sum[k] = Join::join(sum[k], static_cast<double>(values[(c + k) * run + i]));
    }
    for (int k = 0; k < count; ++k) sums[c + k] = sum[k];
  };
  int64_t c = 0;
  // Four columns side by side: a single one would wait for each of its additions.
  for (; c + 4 <= cols; c += 4) columns(c, std::integral_constant<int, 4>{});
  for (; c < cols; ++c) columns(c, std::integral_constant<int, 1>{});
}

template <class A>
void fold(const A* values, int64_t cols, int64_t run, double* sums, bool largest, bool begins) {
  largest ? fold_as<Largest>(values, cols, run, sums, begins)
          : fold_as<Sum>(values, cols, run, sums, begins);
}

// values[s] = what the slice is scored, from its sum and its size
template <Finish kFinish>
inline void finish_as(const double* __restrict sums, const int32_t* __restrict sizes, int64_t n,
                      double* __restrict values) {
#pragma omp simd
  for (int64_t s = 0; s < n; ++s) values[s] = finish_slice<kFinish>(sums[s], sizes[s]);
}

inline void finish(Finish how, const double* sums, const int32_t* sizes, int64_t n, double* values) {
  switch (how) {
    case Finish::kRootMeanSquare:
      return finish_as<Finish::kRootMeanSquare>(sums, sizes, n, values);
    case Finish::kSquareOverRoot:
      return finish_as<Finish::kSquareOverRoot>(sums, sizes, n, values);
    case Finish::kMean:
      return finish_as<Finish::kMean>(sums, sizes, n, values);
    case Finish::kItself:
      return finish_as<Finish::kItself>(sums, sizes, n, values);
    case Finish::kAbsolute:
      return finish_as<Finish::kAbsolute>(sums, sizes, n, values);
    case Finish::kHalf:
      return finish_as<Finish::kHalf>(sums, sizes, n, values);
  }
}

}  // namespace

template <class T>
const RowKernels<T>& table() {
  static constexpr RowKernels<T> kernels{
      score<T>, shrink<T>, lasso<T>, sgd<T>, adamw<T>, fold<accumulator_t<T>>, finish};
  return kernels;
}

template const RowKernels<float>& table<float>();
template const RowKernels<double>& table<double>();
template const RowKernels<c10::Half>& table<c10::Half>();
template const RowKernels<c10::BFloat16>& table<c10::BFloat16>();

}  // namespace ocsfast::cpu::OCSFAST_ISA
