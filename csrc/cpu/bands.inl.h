// Loops over bands, with prefetching.
// A part of rows.inl.h, which says how it is compiled.

namespace ocsfast::cpu::OCSFAST_ISA {
namespace {

// Elements of a band that are summed in float before the sum goes on in double, 64 in each lane. 64
// additions in float lose less than rounding the result to float does.
template <class A>
constexpr int64_t kStretch = 64 * Lanes<A>::count;
// How far ahead to prefetch: 8 KB in all, shared by the tensors that a loop reads. On an EPYC of Zen 5
// penalized SGD on rows of 1024 took 1.04 of torch's step with 4 KB for each of its three tensors, 0.97
// with 2.5 KB and 1.04 with 1.5 KB; reading one tensor alone 1.01 of a flat read with 8 KB, 1.08 with 4.
constexpr int64_t kPrefetchBytes = 8192;
// Bands whose lanes are reduced together. Reducing those of a single band takes as long as reading 64
// elements.
constexpr int64_t kBandsAtOnce = 4;

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

inline int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// Calls body(k, first, last, sum) for stretches of the elements of each band k, and writes the reduced
// sums to band_sums[k].
template <class Reduce, class T, class Body>
inline void for_bands(const Bands<T>& b, const Body& body) {
  using A = accumulator_t<T>;
  for (int64_t k = 0; k < b.count; k += kBandsAtOnce) {
    typename Lanes<A>::type sum[kBandsAtOnce] = {};
    double total[kBandsAtOnce] = {}, rest[kBandsAtOnce];
    const int64_t some = smaller(kBandsAtOnce, b.count - k);
    for (int64_t r = 0; r < some; ++r) {
      for (int64_t first = 0; first < b.width; first += kStretch<A>) {
        if (first > 0) total[r] = Reduce::combine(total[r], reduce_one<Reduce>(sum[r]));
        typename Lanes<A>::type own = {};  // stays in a register
        body(k + r, first, smaller(first + kStretch<A>, b.width), own);
        sum[r] = own;
      }
    }
    reduce_four<Reduce>(sum, rest);
    for (int64_t r = 0; r < some; ++r) b.band_sums[k + r] = Reduce::combine(total[r], rest[r]);
  }
}

// The share of each of so many tensors, in whole cache lines.
constexpr int64_t prefetch_bytes(int64_t tensors) {
  return kPrefetchBytes / tensors / 64 * 64;
}

// Prefetches what comes later. The machine's own prefetcher stops at every page. Without this, reading
// takes a third longer, and a step of SGD twice as long where slopes and flags of the columns do not
// stay in the first cache (rows of 4608: 16.4 instead of 8.5 ms for 25 M elements).
template <class T>
inline OCSFAST_INLINE void prefetch(const T* p, int64_t j, int64_t bytes_ahead) {
  __builtin_prefetch(p + j + bytes_ahead / static_cast<int64_t>(sizeof(T)));
}

// Where the elements touched next lie: within a stretch of `length` elements up to `end`, and from there
// on `jump` elements further. Prefetching what is jumped over would cost memory bandwidth.
struct Path {
  int64_t length, end, jump;
};

template <class T>
inline OCSFAST_INLINE void prefetch(const T* p, int64_t j, const Path& path, int64_t bytes_ahead) {
  const int64_t i = j + smaller(bytes_ahead / static_cast<int64_t>(sizeof(T)), path.length);
  __builtin_prefetch(p + i + (i < path.end ? 0 : path.jump));
}

// Elements between the end of a pruned band k and what is touched next.
template <class T>
inline int64_t elements_to_skip(const Bands<T>& b, int64_t k) {
  if (b.num_spans > 0) return b.spans[0].first;
  int64_t next = k + 1;
  while (next < b.count && !b.pruned[next]) ++next;
  return (next - k - 1) * b.width;
}

// As for_bands, but for the elements that are touched: all in a pruned band, else those in the spans.
// Calls body(k, first, last, path, sum).
template <class T, class Body>
inline void for_touched(const Bands<T>& b, const Body& body) {
  for_bands<Sum>(b, [&](int64_t k, int64_t first, int64_t last, auto& sum) OCSFAST_INLINE {
    const bool whole = b.touches_all || b.pruned[k];
    const int64_t count = whole ? 1 : b.num_spans;
    for (int64_t s = 0; s < count; ++s) {
      const Span span = whole ? Span{0, b.width} : b.spans[s];
      const int64_t from = larger(first, span.first), to = smaller(last, span.last);
      if (from >= to) continue;
      int64_t jump = 0;
      if (s + 1 < count) {
        jump = b.spans[s + 1].first - span.last;
      } else if (!whole) {
        jump = b.width - span.last + b.spans[0].first;
      } else if (!b.touches_all) {
        jump = elements_to_skip(b, k);
      }
      const int64_t length = b.touches_all ? INT32_MAX : span.last - span.first;
      body(k, from, to, Path{length, span.last, jump}, sum);
    }
  });
}

}  // namespace
}  // namespace ocsfast::cpu::OCSFAST_ISA
