// The cost of kept counts, one axis and one summand at a time. Host and device.
#pragma once

#include "plan.h"

namespace ocsfast {

// How many indices an axis keeps where family f keeps kept[f] groups.
OCSFAST_HOST_DEVICE inline int64_t axis_size(const CostModel& cost, int32_t axis, const int64_t* kept) {
  int64_t size = cost.axis_fixed[axis];
  for (int64_t e = cost.axis_start[axis]; e < cost.axis_start[axis + 1]; ++e)
    size += cost.entry_count[e] * kept[cost.entry_family[e]];
  return size;
}

OCSFAST_HOST_DEVICE inline int64_t term_cost(const CostModel& cost, int32_t term, const int64_t* axis) {
  return cost.term_coefficient[term] * axis[cost.term_rows[term]] * axis[cost.term_cols[term]];
}

// Where a count lies in a grid: `offset` of `width` beyond point `index`. Beyond the last point, and
// before the first, it is at that point.
struct GridPlace {
  int64_t index, next;  // next: 1, or 0 at the last point
  int64_t offset, width;
};

OCSFAST_HOST_DEVICE inline GridPlace find_place(const int64_t* grid, int64_t points, int64_t count) {
  int64_t low = 0, high = points;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (grid[middle] <= count) {
      low = middle;
    } else {
      high = middle;
    }
  }
  if (low + 1 == points || count <= grid[low]) return {low, 0, 0, 1};
  return {low, 1, count - grid[low], grid[low + 1] - grid[low]};
}

// A number between two integers: whole + rest / width, with 0 <= rest < width.
struct Between {
  int64_t whole, rest;
};

// low + (high - low) · offset / width. The difference is divided first, as its product with a count
// could exceed 64 bits: what is multiplied is below kMaxGridCount.
OCSFAST_HOST_DEVICE inline Between between(int64_t low, int64_t high, int64_t offset, int64_t width) {
  const int64_t steps = (high - low) / width, left = (high - low) % width * offset;
  return {low + steps * offset + left / width, left % width};
}

// Bilinear interpolation, rounded down. Exact: rests are carried, so the largest number here is that of
// a value or kMaxGridCount cubed.
OCSFAST_HOST_DEVICE inline int64_t lookup_cost(const CostModel& cost, int32_t lookup,
                                               const int64_t* axis) {
  const int64_t* const start = cost.grid_start + 2 * int64_t{lookup};
  const int64_t points = start[2] - start[1];
  const GridPlace row =
      find_place(cost.grid + start[0], start[1] - start[0], axis[cost.lookup_rows[lookup]]);
  const GridPlace col = find_place(cost.grid + start[1], points, axis[cost.lookup_cols[lookup]]);
  const int64_t* const low = cost.values + cost.value_start[lookup] + row.index * points + col.index;
  const int64_t* const high = low + row.next * points;
  const Between a = between(low[0], low[col.next], col.offset, col.width);
  const Between b = between(high[0], high[col.next], col.offset, col.width);
  const int64_t steps = (b.whole - a.whole) / row.width, left = (b.whole - a.whole) % row.width;
  const int64_t rest = a.rest * (row.width - row.offset) + (b.rest + left * col.width) * row.offset;
  return a.whole + steps * row.offset + rest / (row.width * col.width);
}

}  // namespace ocsfast
