#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,f16c")
#define OCSFAST_ISA avx2
#define OCSFAST_HALF_LANES 8
#include "rows.inl.h"
#endif
