// An optimizer's step in one walk, with Eq. 8 before and Eq. 9 after it, for whichever optimizer.
// A part of rows.inl.h, which says how it is compiled.

namespace ocsfast::cpu::OCSFAST_ISA {
namespace {

// A rule says how the optimizer moves a weight. It has
//   kStates      the tensors it keeps like each weight
//   multiplier   of gradients
//   slope        what L2 weight decay adds to the gradient: slope * weight
//   move(before, change, load_state, store_state)
//                the weight after a step; `change` is the gradient with Eq. 8 in it. load_state(i) reads
//                state i, store_state(i, value) writes it and returns what it stored, rounded

template <class A, bool kMomentum, bool kNesterov>
struct Sgd {
  using V = typename Lanes<A>::type;
  static constexpr int kStates = kMomentum;
  V lr, momentum, gain, slope, multiplier;
  bool begins;

  explicit Sgd(const SgdScalars<A>& scalars)
      : lr(splat<A>(scalars.lr)),
        momentum(splat<A>(scalars.momentum)),
        gain(splat<A>(scalars.gain)),
        slope(splat<A>(scalars.weight_decay)),
        multiplier(splat<A>(scalars.multiplier)),
        begins(scalars.begins) {}

  template <class LoadState, class StoreState>
  OCSFAST_INLINE V move(V before, V change, const LoadState& load_state,
                        const StoreState& store_state) const {
    if constexpr (kMomentum) {
      const V kept = begins ? V{} : load_state(0) * momentum;
      const V moved = store_state(0, kept + change * gain);
      change = kNesterov ? change + moved * momentum : moved;
    }
    return before - change * lr;
  }
};

template <class A>
struct Adamw {
  using V = typename Lanes<A>::type;
  static constexpr int kStates = 2;
  V beta1, gain1, beta2, gain2, decay, rate, scale, eps, slope, multiplier;

  explicit Adamw(const AdamwScalars<A>& scalars)
      : beta1(splat<A>(scalars.beta1)),
        gain1(splat<A>(scalars.gain1)),
        beta2(splat<A>(scalars.beta2)),
        gain2(splat<A>(scalars.gain2)),
        decay(splat<A>(scalars.decay)),
        rate(splat<A>(scalars.rate)),
        scale(splat<A>(scalars.scale)),
        eps(splat<A>(scalars.eps)),
        slope{},
        multiplier(splat<A>(scalars.multiplier)) {}

  // Uses the averages as they are before they are rounded to T: a mean square too small for float16 is
  // stored as 0, and the weight would be divided by eps alone.
  template <class LoadState, class StoreState>
  OCSFAST_INLINE V move(V before, V change, const LoadState& load_state,
                        const StoreState& store_state) const {
    const V average = load_state(0) * beta1 + change * gain1;
    const V square = load_state(1) * beta2 + change * change * gain2;
    store_state(0, average);
    store_state(1, square);
    return before * decay - average * rate / (root(square) * scale + eps);
  }
};

// kPenalized: there is a penalty. kWithCols: columns are summed. kPruned: columns are pruned too.
template <bool kPenalized, bool kWithCols, bool kPruned, class Rule, class T>
inline void step_bands(const Bands<T>& b, const Rule& rule) {
  using A = accumulator_t<T>;
  using V = typename Lanes<A>::type;
  constexpr int64_t kAhead = prefetch_bytes(2 + Rule::kStates);
  const uint8_t* __restrict flags = b.pruned_cols;
  const A* __restrict slopes = b.slopes;
  A* __restrict cols = b.col_sums;
  for_bands<Sum>(b, [&](int64_t k, int64_t first, int64_t last, V& sum) OCSFAST_INLINE {
    T* __restrict w = b.w + k * b.width;
    const T* __restrict grad = b.grad + k * b.width;
    T* __restrict state0 = Rule::kStates > 0 ? b.state[0] + k * b.width : nullptr;
    T* __restrict state1 = Rule::kStates > 1 ? b.state[1] + k * b.width : nullptr;
    V band_slope = rule.slope, band_factor = splat<A>(1);
    const V shrunk = splat<A>(b.factor);
    if constexpr (kPenalized) {
      band_slope += b.slope[k];
      if (b.pruned[k]) band_factor = shrunk;
    }
    for_lanes<A>(first, last, [=, &sum](int64_t j, auto n) OCSFAST_INLINE {
      prefetch(w, j, kAhead);
      prefetch(grad, j, kAhead);
      if constexpr (Rule::kStates > 0) prefetch(state0, j, kAhead);
      if constexpr (Rule::kStates > 1) prefetch(state1, j, kAhead);
      const auto load_state = [=](int i) OCSFAST_INLINE {
        return load_n<A>((i == 0 ? state0 : state1) + j, n);
      };
      const auto store_state = [=](int i, V v) OCSFAST_INLINE {
        return store_n<A>((i == 0 ? state0 : state1) + j, n, v);
      };
      V slope = band_slope, factor = band_factor;
      if constexpr (kPruned) {
        slope += load_n<A>(slopes + j, n);
        factor *= where_set<A>(flags + j, shrunk);
      }
      const V before = load_n<A>(w + j, n);
      V change = load_n<A>(grad + j, n) * rule.multiplier;
      change = slope != 0 ? change + before * slope : change;
      V now = rule.move(before, change, load_state, store_state);
      if constexpr (kPenalized) now *= factor;
      now = store_n<A>(w + j, n, now);
      if constexpr (kPenalized) {
        const V square = now * now;
        sum += square;
        if constexpr (kWithCols) store_n<A>(cols + j, n, load_n<A>(cols + j, n) + square);
      }
    });
  });
}

template <class Rule, class T>
inline void step_as(const Bands<T>& b, const Rule& rule) {
  if (!b.pruned) {
    step_bands<false, false, false>(b, rule);
  } else if (!b.col_sums) {
    step_bands<true, false, false>(b, rule);
  } else if (!b.pruned_cols) {
    step_bands<true, true, false>(b, rule);
  } else {
    step_bands<true, true, true>(b, rule);
  }
}

template <class T>
void sgd(const Bands<T>& b, const SgdScalars<accumulator_t<T>>& scalars) {
  using A = accumulator_t<T>;
  if (!b.state[0]) {
    step_as(b, Sgd<A, false, false>(scalars));
  } else if (scalars.nesterov) {
    step_as(b, Sgd<A, true, true>(scalars));
  } else {
    step_as(b, Sgd<A, true, false>(scalars));
  }
}

template <class T>
void adamw(const Bands<T>& b, const AdamwScalars<accumulator_t<T>>& scalars) {
  step_as(b, Adamw<accumulator_t<T>>(scalars));
}

}  // namespace
}  // namespace ocsfast::cpu::OCSFAST_ISA
