// An optimizer's step in one pass, with the penalty before and after it, whatever the optimizer's rule.
// Part of rows.inl.h, which says how it is compiled.

namespace ocsfast::cpu::OCSFAST_ISA {
namespace {

// A rule moves `before` by `change`, the gradient with Eq. 8 in it. It reads state i by held(i), and
// writes it by keep(i, value), which returns what is stored.
//   kStates; sign: of gradients; slope: what is added to them of the weights

template <class A, bool kMomentum, bool kNesterov>
struct Sgd {
  using V = typename Lanes<A>::type;
  static constexpr int kStates = kMomentum;
  V lr, decay, gain, slope, sign;
  bool begins;

  explicit Sgd(const SgdStep<A>& step)
      : lr(splat<A>(step.lr)),
        decay(splat<A>(step.decay)),
        gain(splat<A>(step.gain)),
        slope(splat<A>(step.weight_decay)),
        sign(splat<A>(step.sign)),
        begins(step.begins) {}

  template <class Held, class Keep>
  OCSFAST_INLINE V move(V before, V change, const Held& held, const Keep& keep) const {
    if constexpr (kMomentum) {
      const V kept = begins ? V{} : held(0) * decay;
      const V moved = keep(0, kept + change * gain);
      change = kNesterov ? change + moved * decay : moved;
    }
    return before - change * lr;
  }
};

template <class A>
struct Adamw {
  using V = typename Lanes<A>::type;
  static constexpr int kStates = 2;
  V beta1, gain1, beta2, gain2, left, rate, scale, eps, slope, sign;

  explicit Adamw(const AdamwStep<A>& step)
      : beta1(splat<A>(step.beta1)),
        gain1(splat<A>(step.gain1)),
        beta2(splat<A>(step.beta2)),
        gain2(splat<A>(step.gain2)),
        left(splat<A>(step.keep)),
        rate(splat<A>(step.rate)),
        scale(splat<A>(step.scale)),
        eps(splat<A>(step.eps)),
        slope{},
        sign(splat<A>(step.sign)) {}

  // By the averages as they are before they are stored: a square that half precision cannot hold would
  // divide by next to nothing.
  template <class Held, class Keep>
  OCSFAST_INLINE V move(V before, V change, const Held& held, const Keep& keep) const {
    const V average = held(0) * beta1 + change * gain1;
    const V square = held(1) * beta2 + change * change * gain2;
    keep(0, average);
    keep(1, square);
    return before * left - average * rate / (root(square) * scale + eps);
  }
};

// kWithCols: column sums are taken; kPruned: and columns are pruned.
template <bool kPenalized, bool kWithCols, bool kPruned, class Rule, class T>
inline void step_all(const Bands<T>& b, const Rule& rule) {
  using A = accumulator_t<T>;
  using V = typename Lanes<A>::type;
  const uint8_t* __restrict flags = b.pruned_cols;
  const A* __restrict slopes = b.slopes;
  A* __restrict cols = b.col_sums;
  for_bands<Sum>(b, [&](int64_t k, int64_t first, int64_t last, V& sum) OCSFAST_INLINE {
    T* __restrict w = b.w + k * b.width;
    const T* __restrict grad = b.grad + k * b.width;
    T* __restrict state0 = Rule::kStates > 0 ? b.state[0] + k * b.width : nullptr;
    T* __restrict state1 = Rule::kStates > 1 ? b.state[1] + k * b.width : nullptr;
    V own_slope = rule.slope, own_factor = splat<A>(1);
    const V once = splat<A>(b.factor);
    if constexpr (kPenalized) {
      own_slope += b.slope[k];
      if (b.pruned[k]) own_factor = once;
    }
    for_lanes<A>(first, last, [=, &sum](int64_t j, auto n) OCSFAST_INLINE {
      fetch(w, j, kAheadOfSeveral);
      fetch(grad, j, kAheadOfSeveral);
      if constexpr (Rule::kStates > 0) fetch(state0, j, kAheadOfSeveral);
      if constexpr (Rule::kStates > 1) fetch(state1, j, kAheadOfSeveral);
      const auto held = [=](int i)
                            OCSFAST_INLINE { return load_n<A>((i == 0 ? state0 : state1) + j, n); };
      const auto keep = [=](int i, V v)
                            OCSFAST_INLINE { return store_n<A>((i == 0 ? state0 : state1) + j, n, v); };
      V slope = own_slope, factor = own_factor;
      if constexpr (kPruned) {
        slope += load_n<A>(slopes + j, n);
        factor *= where_set<A>(flags + j, once);
      }
      const V before = load_n<A>(w + j, n);
      V change = load_n<A>(grad + j, n) * rule.sign;
      change = slope != 0 ? change + before * slope : change;
      V now = rule.move(before, change, held, keep);
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
inline void step_by(const Bands<T>& b, const Rule& rule) {
  if (!b.pruned) {
    step_all<false, false, false>(b, rule);
  } else if (!b.col_sums) {
    step_all<true, false, false>(b, rule);
  } else if (!b.pruned_cols) {
    step_all<true, true, false>(b, rule);
  } else {
    step_all<true, true, true>(b, rule);
  }
}

template <class T>
void sgd(const Bands<T>& b, const SgdStep<accumulator_t<T>>& step) {
  using A = accumulator_t<T>;
  if (!b.state[0]) {
    step_by(b, Sgd<A, false, false>(step));
  } else if (step.nesterov) {
    step_by(b, Sgd<A, true, true>(step));
  } else {
    step_by(b, Sgd<A, true, false>(step));
  }
}

template <class T>
void adamw(const Bands<T>& b, const AdamwStep<accumulator_t<T>>& step) {
  step_by(b, Adamw<accumulator_t<T>>(step));
}

}  // namespace
}  // namespace ocsfast::cpu::OCSFAST_ISA
