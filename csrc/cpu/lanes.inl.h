// Vectors of a fixed number of lanes: loading, storing, reducing them, and loops in steps of a vector.
// A part of rows.inl.h, which says how it is compiled.

namespace ocsfast::cpu::OCSFAST_ISA {
namespace {

// On every machine, whatever its own vectors hold, so that sums are the same on all of them.
constexpr int kVectorBytes = 64;
// For the bodies of loops: a call would pass vectors through memory.
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

// Stores return what they stored: v, rounded to the type of p.
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

// Square roots. Rounded correctly, hence the same on every machine.
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

// Loads n < Lanes<A>::count elements; the other lanes are 0.
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
  for (int64_t i = n; i < Lanes<A>::count; ++i) lanes[i] = T(0);  // these lanes may hold NaN, from 0 / 0
  return load(lanes);
}

// Calls body(j, n) for the elements first .. last - 1, n at a time. n is the constant Lanes<A>::count,
// but fewer and a variable in the last call.
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
  static V combine(V a, V b) {
    return a + b;
  }
};
struct Largest {
  template <class V>
  static V combine(V a, V b) {
    return (a > b) | (a != a) ? a : b;  // NaN wins
  }
};

// Reduces the lanes of each of four vectors to one number: the upper half onto the lower, and again.
template <class Reduce>
inline void reduce_four_floats(const FloatLanes (&v)[4], double (&out)[4]) {
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  const auto pair = [](FloatLanes a, FloatLanes b) {
    return Reduce::combine(
        __builtin_shuffle(a, b, I{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}),
        __builtin_shuffle(a, b, I{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}));
  };
  const FloatLanes ab = pair(v[0], v[1]), cd = pair(v[2], v[3]);
  FloatLanes all = Reduce::combine(
      __builtin_shuffle(ab, cd, I{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}),
      __builtin_shuffle(ab, cd, I{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31}));
  all = Reduce::combine(all,
                        __builtin_shuffle(all, I{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  all = Reduce::combine(all,
                        __builtin_shuffle(all, I{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
  for (int k = 0; k < 4; ++k) out[k] = all[4 * k];
}

template <class Reduce, class V>
inline double reduce_one(const V& v) {
  using A = std::remove_cv_t<std::remove_reference_t<decltype(v[0])>>;
  A lanes[Lanes<A>::count];
  store(lanes, v);
  for (int64_t half = Lanes<A>::count / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] = Reduce::combine(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

template <class Reduce, class V>
inline void reduce_four(const V (&v)[4], double (&out)[4]) {
  if constexpr (sizeof(v[0][0]) == sizeof(float)) {
    reduce_four_floats<Reduce>(v, out);
  } else {
    for (int k = 0; k < 4; ++k) out[k] = reduce_one<Reduce>(v[k]);
  }
}

// Widens flags, 0 or 1, to the width of a lane. In several conversions, each to twice the width: for a
// wider one the compiler converts element by element, or takes many instructions where the machine has
// one.
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

// `yes` in the lanes whose flag is set, 1 in the others. Flags have room for whole vectors.
template <class A>
inline OCSFAST_INLINE typename Lanes<A>::type where_set(const uint8_t* flags,
                                                        typename Lanes<A>::type yes) {
  return widen(flags, yes) != 0 ? yes : typename Lanes<A>::type{} + A(1);
}

}  // namespace
}  // namespace ocsfast::cpu::OCSFAST_ISA
