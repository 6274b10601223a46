// The bodies of RowKernels. Included by rows_<isa>.cpp, each with its own target, OCSFAST_ISA and
// OCSFAST_HALF_LANES: how many float16 one instruction converts. Nothing of std is called here, whose
// templates could be compiled for one machine and linked for another.

namespace ocsfast::cpu::OCSFAST_ISA {
namespace {

// Whatever the machine's vectors hold, so that sums are the same on each.
constexpr int kVectorBytes = 64;
// Elements a lane adds up before the sum goes on in double: 64 additions lose less than rounding the
// result to float does.
constexpr int64_t kVectorsPerFold = 64;
// Rows read side by side: a column's sum is loaded and stored once for four elements.
constexpr int kRowsAtOnce = 4;
// Rows side by side defeat the machine's own prefetching: without ours, which is as far ahead as the
// next four rows and this many elements at least, sums take twice as long as a flat read.
constexpr int64_t kPrefetchElements = 2048;

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

inline void store(float* p, FloatLanes v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

inline Lanes<double>::type load(const double* p) {
  Lanes<double>::type v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(double* p, Lanes<double>::type v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

inline FloatLanes load(const c10::BFloat16* p) {
  Halves half;
  __builtin_memcpy(&half, p, sizeof(half));
  return (FloatLanes)(__builtin_convertvector(half, Words) << 16);
}

inline void store(c10::BFloat16* p, FloatLanes v) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Halves half = __builtin_convertvector(v == v ? rounded : Words{} + 0x7FC0, Halves);
  __builtin_memcpy(p, &half, sizeof(half));
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

inline void store(c10::Half* p, FloatLanes v) {
#if OCSFAST_HALF_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif OCSFAST_HALF_LANES == 8
  __m256 low, high;
  __builtin_memcpy(&low, &v, sizeof(low));
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(low, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(high, 0));
#else
  for (int i = 0; i < Lanes<float>::count; ++i) p[i] = static_cast<c10::Half>(v[i]);
#endif
}

template <class A>
inline double fold(const typename Lanes<A>::type& v) {
  A lanes[Lanes<A>::count];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int64_t half = Lanes<A>::count / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <int kRows, bool kWithCols, class T, class A>
inline void square_rows(const T* __restrict w, int64_t width, double* __restrict sums,
                        A* __restrict cols) {
  using V = typename Lanes<A>::type;
  constexpr int64_t kLanes = Lanes<A>::count;
  const int64_t ahead = kRows * width > kPrefetchElements ? kRows * width : kPrefetchElements;
  double total[kRows] = {};
  int64_t j = 0;
  while (j + kLanes <= width) {
    const int64_t most = j + kVectorsPerFold * kLanes, whole = width - kLanes + 1;
    const int64_t end = most < whole ? most : whole;
    V sum[kRows] = {};
    for (; j < end; j += kLanes) {
      V over_rows = {};
      for (int r = 0; r < kRows; ++r) {
        const V v = load(w + r * width + j);
        __builtin_prefetch(w + r * width + j + ahead);
        const V square = v * v;
        sum[r] += square;
        if constexpr (kWithCols) over_rows += square;
      }
      if constexpr (kWithCols) store(cols + j, load(cols + j) + over_rows);
    }
    for (int r = 0; r < kRows; ++r) total[r] += fold<A>(sum[r]);
  }
  for (; j < width; ++j) {
    A over_rows = 0;
    for (int r = 0; r < kRows; ++r) {
      const A v = static_cast<A>(w[r * width + j]);
      const A square = v * v;
      total[r] += square;
      over_rows += square;
    }
    if constexpr (kWithCols) cols[j] += over_rows;
  }
  for (int r = 0; r < kRows; ++r) sums[r] = total[r];
}

template <bool kWithCols, class T, class A>
inline void square_all(const T* w, int64_t rows, int64_t width, double* sums, A* cols) {
  int64_t r = 0;
  for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) {
    square_rows<kRowsAtOnce, kWithCols>(w + r * width, width, sums + r, cols);
  }
  for (; r < rows; ++r) square_rows<1, kWithCols>(w + r * width, width, sums + r, cols);
}

template <class T>
void square(const T* w, int64_t rows, int64_t width, double* sums, accumulator_t<T>* cols) {
  if (cols) {
    square_all<true>(w, rows, width, sums, cols);
  } else {
    square_all<false>(w, rows, width, sums, cols);
  }
}

template <class T>
void scale(T* w, int64_t n, accumulator_t<T> factor) {
  using A = accumulator_t<T>;
  constexpr int64_t kLanes = Lanes<A>::count;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(w + j, load(w + j) * factor);
  for (; j < n; ++j) w[j] = static_cast<T>(static_cast<A>(w[j]) * factor);
}

template <class T>
void scale_by(T* __restrict w, int64_t n, const accumulator_t<T>* __restrict factors) {
  using A = accumulator_t<T>;
  constexpr int64_t kLanes = Lanes<A>::count;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(w + j, load(w + j) * load(factors + j));
  for (; j < n; ++j) w[j] = static_cast<T>(static_cast<A>(w[j]) * factors[j]);
}

template <class T>
void add(T* __restrict grad, const T* __restrict w, int64_t n, accumulator_t<T> factor) {
  using A = accumulator_t<T>;
  constexpr int64_t kLanes = Lanes<A>::count;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(grad + j, load(grad + j) + load(w + j) * factor);
  for (; j < n; ++j) {
    grad[j] = static_cast<T>(static_cast<A>(grad[j]) + static_cast<A>(w[j]) * factor);
  }
}

template <class T>
void add_by(T* __restrict grad, const T* __restrict w, int64_t n, accumulator_t<T> factor,
            const accumulator_t<T>* __restrict factors) {
  using A = accumulator_t<T>;
  using V = typename Lanes<A>::type;
  constexpr int64_t kLanes = Lanes<A>::count;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const V both = splat<A>(factor) + load(factors + j);
    const V now = load(grad + j);
    store(grad + j, both != splat<A>(0) ? now + load(w + j) * both : now);
  }
  for (; j < n; ++j) {
    const A both = factor + factors[j];
    const T sum = static_cast<T>(static_cast<A>(grad[j]) + static_cast<A>(w[j]) * both);
    grad[j] = both != A(0) ? sum : grad[j];
  }
}

}  // namespace

template <class T>
const RowKernels<T>& table() {
  static constexpr RowKernels<T> kernels{square<T>, scale<T>, scale_by<T>, add<T>, add_by<T>};
  return kernels;
}

template const RowKernels<float>& table<float>();
template const RowKernels<double>& table<double>();
template const RowKernels<c10::Half>& table<c10::Half>();
template const RowKernels<c10::BFloat16>& table<c10::BFloat16>();

}  // namespace ocsfast::cpu::OCSFAST_ISA
