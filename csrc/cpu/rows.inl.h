// The bodies of RowKernels. rows_<isa>.cpp includes this file with a target of its own, with
// OCSFAST_ISA, and with OCSFAST_HALF_LANES: how many half-precision numbers one instruction converts. No
// function of std is called here, nor in the files it includes: the linker keeps one copy of such a
// template, perhaps the one that was compiled for instructions this machine does not have.

#include "lanes.inl.h"

#include "bands.inl.h"
#include "optimizer_step.inl.h"

namespace ocsfast::cpu::OCSFAST_ISA {
namespace {

// What a criterion takes from an element w; x is the one in its place of Bands::other.
struct Square : Sum {
  static constexpr bool kNeedsOther = false;
  template <class V>
  static V term(V w, V) {
    return w * w;
  }
};
struct Absolute : Sum {
  static constexpr bool kNeedsOther = false;
  template <class V>
  static V term(V w, V) {
    return w < 0 ? -w : w;
  }
};
struct LargestAbsolute : Largest {
  static constexpr bool kNeedsOther = false;
  template <class V>
  static V term(V w, V) {
    return w < 0 ? -w : w;
  }
};
struct Product : Sum {
  static constexpr bool kNeedsOther = true;
  template <class V>
  static V term(V w, V x) {
    return w * x;
  }
};
struct SquaredProduct : Sum {
  static constexpr bool kNeedsOther = true;
  template <class V>
  static V term(V w, V x) {
    return (w * x) * (w * x);
  }
};
struct Weighted : Sum {
  static constexpr bool kNeedsOther = true;
  template <class V>
  static V term(V w, V x) {
    return w * w * x;
  }
};

template <bool kWithCols, class E, class T>
inline void score_all(const Bands<T>& b) {
  using A = accumulator_t<T>;
  using V = typename Lanes<A>::type;
  constexpr int64_t kAhead = prefetch_bytes(E::kNeedsOther ? 2 : 1);
  A* __restrict cols = b.col_sums;
  for_bands<E>(b, [&](int64_t k, int64_t first, int64_t last, V& sum) OCSFAST_INLINE {
    const T* __restrict w = b.w + k * b.width;
    const T* __restrict x = b.other + k * b.width;
    for_lanes<A>(first, last, [=, &sum](int64_t j, auto n) OCSFAST_INLINE {
      prefetch(w, j, kAhead);
      const V v = load_n<A>(w + j, n);
      V other = v;
      if constexpr (E::kNeedsOther) {
        prefetch(x, j, kAhead);
        other = load_n<A>(x + j, n);
      }
      const V element = E::term(v, other);
      sum = E::combine(sum, element);
      if constexpr (kWithCols) store_n<A>(cols + j, n, E::combine(load_n<A>(cols + j, n), element));
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

// kWithCols: columns are summed. kPruned: columns are pruned too.
template <bool kWithCols, bool kPruned, class T>
inline void shrink_all(const Bands<T>& b) {
  using A = accumulator_t<T>;
  using V = typename Lanes<A>::type;
  constexpr int64_t kAhead = prefetch_bytes(1);
  const uint8_t* __restrict flags = b.pruned_cols;
  A* __restrict cols = b.col_sums;
  for_touched(b, [&](int64_t k, int64_t first, int64_t last, Path path, V& sum) OCSFAST_INLINE {
    T* __restrict w = b.w + k * b.width;
    const V shrunk = splat<A>(b.factor), band_factor = b.pruned[k] ? shrunk : splat<A>(1);
    for_lanes<A>(first, last, [=, &sum](int64_t j, auto n) OCSFAST_INLINE {
      prefetch(w, j, path, kAhead);
      V factor = band_factor;
      if constexpr (kPruned) factor *= where_set<A>(flags + j, shrunk);
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
  constexpr int64_t kAhead = prefetch_bytes(2);
  const A* __restrict slopes = b.slopes;
  for_touched(b, [&](int64_t k, int64_t first, int64_t last, Path path, V&) OCSFAST_INLINE {
    const T* __restrict w = b.w + k * b.width;
    T* __restrict grad = b.grad + k * b.width;
    const V band_slope = splat<A>(b.slope[k]);
    for_lanes<A>(first, last, [=](int64_t j, auto n) OCSFAST_INLINE {
      prefetch(w, j, path, kAhead);
      prefetch(grad, j, path, kAhead);
      V slope = band_slope;
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

template <class Reduce, class A>
inline void fold_as(const A* __restrict values, int64_t cols, int64_t run, double* __restrict sums,
                    bool begins) {
  if (run == 1) {
    if (begins) {
      for (int64_t c = 0; c < cols; ++c) sums[c] = static_cast<double>(values[c]);
    } else {
      for (int64_t c = 0; c < cols; ++c)
        sums[c] = Reduce::combine(sums[c], static_cast<double>(values[c]));
    }
    return;
  }
  const auto columns = [=](int64_t c, auto count) OCSFAST_INLINE {
    double sum[count] = {};
    for (int k = 0; k < count && !begins; ++k) sum[k] = sums[c + k];
    for (int64_t i = 0; i < run; ++i) {
      for (int k = 0; k < count; ++k)
        sum[k] = Reduce::combine(sum[k], static_cast<double>(values[(c + k) * run + i]));
    }
    for (int k = 0; k < count; ++k) sums[c + k] = sum[k];
  };
  int64_t c = 0;
  // Four columns at a time: in a single one each addition would wait for the one before.
  for (; c + 4 <= cols; c += 4) columns(c, std::integral_constant<int, 4>{});
  for (; c < cols; ++c) columns(c, std::integral_constant<int, 1>{});
}

template <class A>
void fold(const A* values, int64_t cols, int64_t run, double* sums, bool largest, bool begins) {
  largest ? fold_as<Largest>(values, cols, run, sums, begins)
          : fold_as<Sum>(values, cols, run, sums, begins);
}

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
    case Finish::kUnchanged:
      return finish_as<Finish::kUnchanged>(sums, sizes, n, values);
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
