// The tables of the plan and of the cost model as the kernels see them. `Plan` and `CostModel` in Python
// write them, field for field. Host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define OCSFAST_HOST_DEVICE __host__ __device__
#else
#define OCSFAST_HOST_DEVICE
#endif

namespace ocsfast {

// Plan.layout: kPlanCounts counts, then the start of each table in Plan.tables.
constexpr int kPlanCounts = 4;   // tensors, slices, groups, families
constexpr int kPlanTables = 11;  // the pointers of Plan below, in this order
// A row of Plan.shapes, which lies on the CPU: rows, cols, inner, channels_last, row base, column base.
constexpr int kShapeFields = 6;

struct Plan {
  int32_t tensors, slices, groups, families;
  int32_t num_rows, num_cols;  // lengths of row_slice and col_slice
  const int32_t* row_slice;    // [num_rows] slice of a row or -1
  const int32_t* col_slice;    // [num_cols]
  const int32_t* slice_size;   // [slices] |w|
  const int32_t* slice_group;  // [slices]
  // The inverse of row_slice and col_slice, by which a thread gathers a slice. Scattering rows and
  // columns to slices would need float atomics, whose order is not fixed.
  const int32_t* slice_tensor;   // [slices] the tensor a slice lies in
  const int32_t* slice_start;    // [slices + 1] CSR: the rows and columns of a slice are
  const int32_t* slice_entry;    // [*] slice_entry[slice_start[s] : slice_start[s + 1]]: a position in
                                 //     row_slice, or num_rows + a position in col_slice
  const int32_t* group_start;    // [groups + 1] CSR: the slices of group g are
  const int32_t* group_slice;    // [slices] group_slice[group_start[g] : group_start[g + 1]]
  const int32_t* family_start;   // [families + 1] the groups of family f: family_start[f] and following
  const int32_t* family_layers;  // [families] layers that share its channels: its weight in Eq. 3
};

// CostModel.layout: kCostCounts counts, then the start of each table in CostModel.tables.
constexpr int kCostCounts = 4;   // axes, entries, terms, lookups
constexpr int kCostTables = 13;  // the pointers of CostModel below, in this order
// The most that a grid of counts holds: its cube fits into 64 bits (cost.h).
constexpr int64_t kMaxGridCount = int64_t{1} << 20;
// The most that all lookups cost together: compare tells costs as doubles.
constexpr int64_t kMaxLookups = int64_t{1} << 53;

// cost = Σ over terms of coefficient · kept(rows axis) · kept(columns axis), where an axis keeps
// axis_fixed indices and entry_count for each kept group of entry_family, summed over the axis's
// entries; and Σ over lookups of the value of its table there, interpolated bilinearly between the
// points of its two grids and rounded down.
struct CostModel {
  int32_t axes, entries, terms, lookups;
  const int64_t* axis_fixed;        // [axes]
  const int64_t* axis_start;        // [axes + 1]
  const int64_t* entry_family;      // [entries]
  const int64_t* entry_count;       // [entries]
  const int64_t* term_coefficient;  // [terms]
  const int64_t* term_rows;         // [terms]
  const int64_t* term_cols;         // [terms]
  const int64_t* lookup_rows;       // [lookups]
  const int64_t* lookup_cols;       // [lookups]
  const int64_t* grid_start;        // [2 * lookups + 1] CSR: a lookup's rows, and then its columns
  const int64_t* value_start;       // [lookups + 1] CSR: a lookup's values, row by row
  const int64_t* grid;              // [*] counts, ascending in each grid
  const int64_t* values;            // [*]
};

// partition's status, bit by bit.
constexpr int32_t kUnreachable = 1;  // the budget cannot be reached
constexpr int32_t kNanScore = 2;     // a score is NaN: nothing is pruned

// What compare tells, and then how many groups each family keeps: cost, status, groups pruned, their
// size, the size of all, Eq. 3, groups that have changed sides.
constexpr int kFacts = 7;

}  // namespace ocsfast
