#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>

// gcc 12 warns about its own headers, where _mm512_undefined_ps() is initialized with itself.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define OCSFAST_ISA avx512
#define OCSFAST_HALF_LANES 16
#include "rows.inl.h"
#endif
