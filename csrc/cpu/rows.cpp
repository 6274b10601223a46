#include "rows.h"

#include "isa.h"

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
  static const Isa isa = choose_isa();
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::table<T>();
  if (isa == Isa::kAvx2) return avx2::table<T>();
#endif
  return baseline::table<T>();
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const RowKernels<c10::Half>& row_kernels<c10::Half>();
template const RowKernels<c10::BFloat16>& row_kernels<c10::BFloat16>();

}  // namespace ocsfast::cpu
