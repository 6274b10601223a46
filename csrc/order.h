// The order in which groups are pruned: by score, where -0.0 equals +0.0, then by index. Host and
// device.
#pragma once

#include <cstdint>
#include <cstring>

#include "plan.h"

namespace ocsfast {

// The image of a score: an unsigned integer, which compares to others as the score does. NaN has none.
OCSFAST_HOST_DEVICE inline uint32_t order_image(float score) {
  const float value = score + 0.0f;  // -0.0 + 0.0 = +0.0
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

OCSFAST_HOST_DEVICE inline uint64_t order_image(double score) {
  const double value = score + 0.0;
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits ^ (bits >> 63 ? ~uint64_t{0} : uint64_t{1} << 63);
}

// How many groups of a family of `size` to prune, if `below` of them lie at or below the threshold: at
// most `limit`, and so many that the kept count is a multiple of `unit`; none if that is not possible.
OCSFAST_HOST_DEVICE inline int64_t groups_to_prune(int64_t size, int64_t below, int64_t limit,
                                                   int64_t unit) {
  int64_t pruned = below < limit ? below : limit;
  if (pruned < 0) pruned = 0;
  unit = unit < size ? unit : size;
  if (unit < 1) unit = 1;
  const int64_t kept = (size - pruned + unit - 1) / unit * unit;
  return kept < size ? size - kept : 0;
}

}  // namespace ocsfast
