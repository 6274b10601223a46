#include "rows.h"

namespace ocsfast::cpu {

namespace baseline {
template <class T>
const RowKernels<T>& table();
}
namespace avx2 {
template <class T>
const RowKernels<T>& table();
}
namespace avx512 {
template <class T>
const RowKernels<T>& table();
}

template <class T>
const RowKernels<T>& row_kernels() {
#if defined(__x86_64__)
  static const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (has_avx512) return avx512::table<T>();
  if (has_avx2) return avx2::table<T>();
#endif
  return baseline::table<T>();
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const RowKernels<c10::Half>& row_kernels<c10::Half>();
template const RowKernels<c10::BFloat16>& row_kernels<c10::BFloat16>();

}  // namespace ocsfast::cpu
