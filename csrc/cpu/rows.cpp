#include "rows.h"

#include <cstdlib>
#include <string_view>

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

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best instruction set that the machine has. The environment variable OCSFAST_ISA ("baseline",
// "avx2") asks for a lesser one, so that tests can compare them.
static Isa choose_isa() {
#if defined(__x86_64__)
  const char* named = std::getenv("OCSFAST_ISA");
  const std::string_view wanted = named ? named : "";
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (wanted == "baseline") return Isa::kBaseline;
  if (has_avx512 && wanted != "avx2") return Isa::kAvx512;
  if (has_avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
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
