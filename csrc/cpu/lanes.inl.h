// What all row kernels are made of: vectors of a fixed number of lanes, and loops over bands in them.
// Part of rows.inl.h, which says how it is compiled.

namespace ocsfast::cpu::OCSFAST_ISA {
namespace {

// Whatever the machine's vectors hold, so that sums are the same on each.
constexpr int kVectorBytes = 64;
// Bodies of loops, whose vectors would else go through memory.
#define OCSFAST_INLINE __attribute__((always_inline))

template <class A>
struct Lanes {
  static constexpr int64_t count = kVectorBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
using FloatLanes = Lanes<float>::type;
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
inline typename Lanes<A>::type splat(A value) {
  return typename Lanes<A>::type{} + value;
}

inline FloatLanes load(const float* p) {
  FloatLanes v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// Returns what is stored: v, rounded to the type of p.
inline FloatLanes store(float* p, FloatLanes v) {
  __builtin_memcpy(p, &v, sizeof(v));
  return v;
}

inline Lanes<double>::type load(const double* p) {
  Lanes<double>::type v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

inline Lanes<double>::type store(double* p, Lanes<double>::type v) {
  __builtin_memcpy(p, &v, sizeof(v));
  return v;
}

inline FloatLanes load(const c10::BFloat16* p) {
#if OCSFAST_HALF_LANES == 16
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (FloatLanes)((Words)_mm512_cvtepu16_epi32(half) << 16);
#else
  Halves half;
  __builtin_memcpy(&half, p, sizeof(half));
  return (FloatLanes)(__builtin_convertvector(half, Words) << 16);
#endif
}

inline FloatLanes store(c10::BFloat16* p, FloatLanes v) {
  const Words bits = (Words)v;
  const Words nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // ties to even
  const Words rounded = v == v ? nearest : Words{} + 0x7FC0;
#if OCSFAST_HALF_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)rounded));
#else
  const Halves half = __builtin_convertvector(rounded, Halves);
  __builtin_memcpy(p, &half, sizeof(half));
#endif
  return (FloatLanes)(rounded << 16);
}

inline FloatLanes load(const c10::Half* p) {
  FloatLanes v;
#if OCSFAST_HALF_LANES == 16
  v = (FloatLanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif OCSFAST_HALF_LANES == 8
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  __builtin_memcpy(&v, &low, sizeof(low));
  __builtin_memcpy(reinterpret_cast<char*>(&v) + sizeof(low), &high, sizeof(high));
#else
  for (int i = 0; i < Lanes<float>::count; ++i) v[i] = static_cast<float>(p[i]);
#endif
  return v;
}

inline FloatLanes store(c10::Half* p, FloatLanes v) {
#if OCSFAST_HALF_LANES == 16
  const __m256i half = _mm512_cvtps_ph((__m512)v, 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  return (FloatLanes)_mm512_cvtph_ps(half);
#else
#if OCSFAST_HALF_LANES == 8
  __m256 low, high;
  __builtin_memcpy(&low, &v, sizeof(low));
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(low, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(high, 0));
#else
  for (int i = 0; i < Lanes<float>::count; ++i) p[i] = static_cast<c10::Half>(v[i]);
#endif
  return load(p);
#endif
}

// Rounded correctly, and so the same on each machine.
inline OCSFAST_INLINE FloatLanes root(FloatLanes v) {
  float lanes[Lanes<float>::count];
  store(lanes, v);
  for (float& lane : lanes) lane = __builtin_sqrtf(lane);
  return load(lanes);
}

inline OCSFAST_INLINE Lanes<double>::type root(Lanes<double>::type v) {
  double lanes[Lanes<double>::count];
  store(lanes, v);
  for (double& lane : lanes) lane = __builtin_sqrt(lane);
  return load(lanes);
}

// Elements of a band that are added up, 64 to a lane, before the sum goes on in double: 64 additions
// lose less than rounding the result to float does.
template <class A>
constexpr int64_t kStretch = 64 * Lanes<A>::count;
// Bytes that are fetched ahead where one tensor is read, and where several are.
constexpr int64_t kAhead = 8192, kAheadOfSeveral = 4096;
// Bands whose lanes are put together at once: for one alone that takes as long as reading 64 elements.
constexpr int64_t kBandsAtOnce = 4;

inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

inline int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// The first n < Lanes<A>::count elements, the rest 0.
template <class A, class T>
inline typename Lanes<A>::type load_some(const T* p, int64_t n) {
  A lanes[Lanes<A>::count] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = static_cast<A>(p[i]);
  return load(lanes);
}

template <class A, class T>
inline typename Lanes<A>::type store_some(T* p, int64_t n, typename Lanes<A>::type v) {
  T lanes[Lanes<A>::count];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  for (int64_t i = n; i < Lanes<A>::count; ++i) lanes[i] = T(0);  // 0 / 0 would spoil a sum
  return load(lanes);
}

// Calls body(j, n) for elements first .. last - 1, n <= Lanes<A>::count at a time: a constant but for
// the last of them.
template <class A, class Body>
inline OCSFAST_INLINE void for_lanes(int64_t first, int64_t last, const Body& body) {
  constexpr int64_t kLanes = Lanes<A>::count;
  int64_t j = first;
  for (; j + kLanes <= last; j += kLanes) body(j, std::integral_constant<int64_t, kLanes>{});
  if (j < last) body(j, last - j);
}

template <class A, class T>
inline typename Lanes<A>::type load_n(const T* p, std::integral_constant<int64_t, Lanes<A>::count>) {
  return load(p);
}
template <class A, class T>
inline typename Lanes<A>::type load_n(const T* p, int64_t n) {
  return load_some<A>(p, n);
}
template <class A, class T>
inline typename Lanes<A>::type store_n(T* p, std::integral_constant<int64_t, Lanes<A>::count>,
                                       typename Lanes<A>::type v) {
  return store(p, v);
}
template <class A, class T>
inline typename Lanes<A>::type store_n(T* p, int64_t n, typename Lanes<A>::type v) {
  return store_some<A>(p, n, v);
}

struct Sum {
  template <class V>
  static V join(V a, V b) {
    return a + b;
  }
};
struct Largest {
  template <class V>
  static V join(V a, V b) {
    return (a > b) | (a != a) ? a : b;  // NaN wins
  }
};

// The lanes of four vectors, each joined into one number, half onto half.
template <class Join>
inline void fold_lanes(const FloatLanes (&v)[4], double (&out)[4]) {
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  const auto pair = [](FloatLanes a, FloatLanes b) {
    return Join::join(
        __builtin_shuffle(a, b, I{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}),
        __builtin_shuffle(a, b, I{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}));
  };
  const FloatLanes ab = pair(v[0], v[1]), cd = pair(v[2], v[3]);
  FloatLanes all = Join::join(
      __builtin_shuffle(ab, cd, I{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}),
      __builtin_shuffle(ab, cd, I{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31}));
  all = Join::join(all, __builtin_shuffle(all, I{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  all = Join::join(all, __builtin_shuffle(all, I{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
  for (int k = 0; k < 4; ++k) out[k] = all[4 * k];
}

template <class Join, class V>
inline double fold_one(const V& v) {
  using A = std::remove_cv_t<std::remove_reference_t<decltype(v[0])>>;
  A lanes[Lanes<A>::count];
  store(lanes, v);
  for (int64_t half = Lanes<A>::count / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] = Join::join(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

template <class Join, class V>
inline void join_lanes(const V (&v)[4], double (&out)[4]) {
  if constexpr (sizeof(v[0][0]) == sizeof(float)) {
    fold_lanes<Join>(v, out);
  } else {
    for (int k = 0; k < 4; ++k) out[k] = fold_one<Join>(v[k]);
  }
}

// Calls body(k, first, last, sum) for each band k, for stretches of its elements, and puts the sums'
// lanes together into band_sums[k].
template <class Join, class T, class Body>
inline void for_bands(const Bands<T>& b, const Body& body) {
  using A = accumulator_t<T>;
  for (int64_t k = 0; k < b.count; k += kBandsAtOnce) {
    typename Lanes<A>::type sum[kBandsAtOnce] = {};
    double total[kBandsAtOnce] = {}, rest[kBandsAtOnce];
    const int64_t some = least(kBandsAtOnce, b.count - k);
    for (int64_t r = 0; r < some; ++r) {
      for (int64_t first = 0; first < b.width; first += kStretch<A>) {
        if (first > 0) total[r] = Join::join(total[r], fold_one<Join>(sum[r]));
        typename Lanes<A>::type own = {};  // stays in a register
        body(k + r, first, least(first + kStretch<A>, b.width), own);
        sum[r] = own;
      }
    }
    join_lanes<Join>(sum, rest);
    for (int64_t r = 0; r < some; ++r) b.band_sums[k + r] = Join::join(total[r], rest[r]);
  }
}

// Fetches what comes later. The machine's own prefetcher stops at every page: without this, reading
// takes a third longer, and a step of SGD twice as long where what is known of the columns does not stay
// in the first cache beside it.
template <class T>
inline OCSFAST_INLINE void fetch(const T* p, int64_t j, int64_t bytes_ahead) {
  __builtin_prefetch(p + j + bytes_ahead / static_cast<int64_t>(sizeof(T)));
}

// A stretch of what is touched, and that what comes behind `end` goes on `jump` elements further.
struct Run {
  int64_t length, end, jump;
};

template <class T>
inline OCSFAST_INLINE void fetch(const T* p, int64_t j, const Run& run, int64_t bytes_ahead) {
  const int64_t i = j + least(bytes_ahead / static_cast<int64_t>(sizeof(T)), run.length);
  __builtin_prefetch(p + i + (i < run.end ? 0 : run.jump));
}

// Elements between a band that is pruned and what is touched next.
template <class T>
inline int64_t left_out_behind(const Bands<T>& b, int64_t k) {
  if (b.num_spans > 0) return b.spans[0].first;
  int64_t next = k + 1;
  while (next < b.count && !b.pruned[next]) ++next;
  return (next - k - 1) * b.width;
}

// The same for what is touched: all of a band that is pruned, of others the spans. Calls
// body(k, first, last, run, sum).
template <class T, class Body>
inline void for_touched(const Bands<T>& b, const Body& body) {
  for_bands<Sum>(b, [&](int64_t k, int64_t first, int64_t last, auto& sum) OCSFAST_INLINE {
    const bool whole = b.dense || b.pruned[k];
    const int64_t count = whole ? 1 : b.num_spans;
    for (int64_t s = 0; s < count; ++s) {
      const Span span = whole ? Span{0, b.width} : b.spans[s];
      const int64_t from = most(first, span.first), to = least(last, span.last);
      if (from >= to) continue;
      int64_t jump = 0;
      if (s + 1 < count) {
        jump = b.spans[s + 1].first - span.last;
      } else if (!whole) {
        jump = b.width - span.last + b.spans[0].first;
      } else if (!b.dense) {
        jump = left_out_behind(b, k);
      }
      const int64_t length = b.dense ? INT32_MAX : span.last - span.first;
      body(k, from, to, Run{length, span.last, jump}, sum);
    }
  });
}

// Flags, 0 or 1, as wide as the lanes they are for. Step by step, as the compiler takes wider
// steps element by element, and with many instructions where the machine has one.
typedef int8_t Bytes16 __attribute__((vector_size(16)));
typedef int16_t Shorts16 __attribute__((vector_size(32)));
typedef int32_t Ints16 __attribute__((vector_size(64)));
typedef int8_t Bytes8 __attribute__((vector_size(8)));
typedef int16_t Shorts8 __attribute__((vector_size(16)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef int64_t Longs8 __attribute__((vector_size(64)));

inline OCSFAST_INLINE Ints16 widen(const uint8_t* flags, FloatLanes) {
#if OCSFAST_HALF_LANES == 16
  return (Ints16)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(flags)));
#else
  Bytes16 bytes;
  __builtin_memcpy(&bytes, flags, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(bytes, Shorts16), Ints16);
#endif
}

inline OCSFAST_INLINE Longs8 widen(const uint8_t* flags, Lanes<double>::type) {
  Bytes8 bytes;
  __builtin_memcpy(&bytes, flags, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, Shorts8), Ints8),
                                 Longs8);
}

// `yes` in the lanes where flags are set, else 1. Flags have room for whole vectors.
template <class A>
inline OCSFAST_INLINE typename Lanes<A>::type where_set(const uint8_t* flags,
                                                        typename Lanes<A>::type yes) {
  return widen(flags, yes) != 0 ? yes : typename Lanes<A>::type{} + A(1);
}

}  // namespace
}  // namespace ocsfast::cpu::OCSFAST_ISA
