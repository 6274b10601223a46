// The instruction set that the CPU's kernels use, chosen when the first of them is called.
#pragma once

#include <cstdlib>
#include <string_view>

namespace ocsfast::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best instruction set that the machine has. The environment variable OCSFAST_ISA ("baseline",
// "avx2") asks for a lesser one, so that tests can compare them.
inline Isa choose_isa() {
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

inline const char* isa_name() {
  switch (choose_isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace ocsfast::cpu
