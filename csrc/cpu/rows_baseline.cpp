#include "rows.h"

#define OCSFAST_ISA baseline
#define OCSFAST_HALF_LANES 0
#include "rows.inl.h"
