#include <algorithm>
#include <array>

#include "checks.h"

namespace ocsfast {
namespace {

constexpr int64_t kMaxExtent = INT32_MAX;

// The starts of the tables ascend, and each table has the length that its count asks for (-1: any).
template <size_t N>
void check_offsets(const char* op, const char* what, const std::vector<int64_t>& layout, int counts,
                   const std::array<int64_t, N>& lengths, int64_t end) {
  for (size_t k = 0; k < N; ++k) {
    const int64_t start = layout[counts + k];
    const int64_t stop = k + 1 < N ? layout[counts + k + 1] : end;
    if (start < 0 || stop < start || stop > end || (lengths[k] >= 0 && stop - start != lengths[k])) {
      fail(op, what, " does not fit its tables: table ", k, " runs from ", start, " to ", stop, " of ",
           end, lengths[k] >= 0 ? ", but its count is " : ", count unknown ", lengths[k]);
    }
  }
}

template <class T>
void check_range(const char* op, const char* table, const T* values, int64_t n, int64_t low,
                 int64_t high) {
  bool inside = true;  // without a branch, so that it vectorizes: some tables are read at every call
  for (int64_t i = 0; i < n; ++i) inside &= values[i] >= low && values[i] < high;
  if (inside) return;
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] < low || values[i] >= high) {
      fail(op, "tables: ", table, '[', i, "] is ", values[i], ", outside ", low, " .. ", high - 1);
    }
  }
}

template <class T>
void check_csr(const char* op, const char* table, const T* starts, int64_t n, int64_t end) {
  bool ascends = starts[0] == 0 && starts[n] == end;
  for (int64_t i = 0; i < n; ++i) ascends &= starts[i] <= starts[i + 1];
  if (!ascends) fail(op, "tables: ", table, " does not ascend from 0 to ", end);
}

void check_counts(const char* op, const char* what, const std::vector<int64_t>& layout, int counts) {
  for (int k = 0; k < counts; ++k) {
    if (layout[k] < 0 || layout[k] > kMaxExtent) fail(op, what, '[', k, "] is ", layout[k]);
  }
}

// Grids that ascend, a value for each of their points, and sums that fit into 64 bits.
void check_lookups(const char* op, const CostModel& cost, int64_t counts, int64_t values) {
  const int64_t lookups = cost.lookups;
  check_range(op, "lookup_rows", cost.lookup_rows, lookups, 0, cost.axes);
  check_range(op, "lookup_cols", cost.lookup_cols, lookups, 0, cost.axes);
  check_csr(op, "grid_start", cost.grid_start, 2 * lookups, counts);
  check_csr(op, "value_start", cost.value_start, lookups, values);
  check_range(op, "grid", cost.grid, counts, 1, kMaxGridCount + 1);
  check_range(op, "values", cost.values, values, 0, kMaxLookups + 1);
  int64_t sum = 0;
  for (int64_t k = 0; k < lookups; ++k) {
    const int64_t* const start = cost.grid_start + 2 * k;
    const int64_t rows = start[1] - start[0], cols = start[2] - start[1];
    const int64_t first = cost.value_start[k], size = cost.value_start[k + 1] - first;
    bool ascends = true;
    for (int64_t i = start[0] + 1; i < start[2]; ++i)
      ascends &= i == start[1] || cost.grid[i - 1] < cost.grid[i];
    if (rows < 1 || cols < 1 || rows * cols != size || !ascends)
      fail(op, "tables: lookup ", k, " has ", size, " values for grids of ", rows, " and ", cols,
           ascends ? "" : ", which do not ascend");
    const int64_t most = *std::max_element(cost.values + first, cost.values + first + size);
    if (most > kMaxLookups - sum) fail(op, "tables: values of all lookups exceed ", kMaxLookups);
    sum += most;
  }
}

}  // namespace

Plan check_plan(const char* op, const Tensor& tables, const std::vector<int64_t>& layout) {
  check_array(op, tables, {"tables", ScalarType::Int, -1, 1}, tables);
  if (layout.size() != kPlanCounts + kPlanTables) {
    fail(op, "layout has ", layout.size(), " entries, expected ", kPlanCounts + kPlanTables);
  }
  check_counts(op, "layout", layout, kPlanCounts);
  const int64_t tensors = layout[0], slices = layout[1], groups = layout[2], families = layout[3];
  const std::array<int64_t, kPlanTables> lengths{
      -1, -1, slices, slices, slices, slices + 1, -1, groups + 1, slices, families + 1, families};
  check_offsets(op, "layout", layout, kPlanCounts, lengths, tables.numel());
  const auto* base = static_cast<const int32_t*>(tables.const_data_ptr());
  const auto table = [&](int k) { return base + layout[kPlanCounts + k]; };
  Plan plan{};
  plan.tensors = static_cast<int32_t>(tensors);
  plan.slices = static_cast<int32_t>(slices);
  plan.groups = static_cast<int32_t>(groups);
  plan.families = static_cast<int32_t>(families);
  plan.num_rows = static_cast<int32_t>(table(1) - table(0));
  plan.num_cols = static_cast<int32_t>(table(2) - table(1));
  plan.row_slice = table(0);
  plan.col_slice = table(1);
  plan.slice_size = table(2);
  plan.slice_group = table(3);
  plan.slice_tensor = table(4);
  plan.slice_start = table(5);
  plan.slice_entry = table(6);
  plan.group_start = table(7);
  plan.group_slice = table(8);
  plan.family_start = table(9);
  plan.family_layers = table(10);
  return plan;
}

void check_entries(const char* op, const Plan& plan, const std::vector<Matrix>& matrices) {
  const int64_t entries = static_cast<int64_t>(plan.num_rows) + plan.num_cols;
  check_range(op, "row_slice", plan.row_slice, plan.num_rows, -1, plan.slices);
  check_range(op, "col_slice", plan.col_slice, plan.num_cols, -1, plan.slices);
  check_range(op, "slice_group", plan.slice_group, plan.slices, 0, plan.groups);
  check_range(op, "slice_tensor", plan.slice_tensor, plan.slices, 0, plan.tensors);
  check_csr(op, "slice_start", plan.slice_start, plan.slices, plan.group_start - plan.slice_entry);
  check_range(op, "slice_entry", plan.slice_entry, plan.group_start - plan.slice_entry, 0, entries);
  check_csr(op, "group_start", plan.group_start, plan.groups, plan.slices);
  check_range(op, "group_slice", plan.group_slice, plan.slices, 0, plan.slices);
  check_csr(op, "family_start", plan.family_start, plan.families, plan.groups);
  for (int32_t s = 0; s < plan.slices; ++s) {
    const Matrix& m = matrices[plan.slice_tensor[s]];
    for (int32_t k = plan.slice_start[s]; k < plan.slice_start[s + 1]; ++k) {
      const int32_t entry = plan.slice_entry[k], col = entry - plan.num_rows;
      const bool is_row = entry < plan.num_rows;
      const int32_t base = is_row ? m.row_base : m.col_base, extent = is_row ? m.rows : m.cols;
      const int32_t position = is_row ? entry : col;
      const bool mine = (is_row ? plan.row_slice[entry] : plan.col_slice[col]) == s;
      if (!mine || base < 0 || position < base || position - base >= extent) {
        fail(op, "tables: slice_entry[", k, "] is ", entry, ", which is no ", is_row ? "row" : "column",
             " of slice ", s, " in tensor ", plan.slice_tensor[s]);
      }
    }
  }
}

void check_families(const char* op, const Plan& plan, const Tensor& tables) {
  if (!tables.is_cpu()) return;
  check_csr(op, "family_start", plan.family_start, plan.families, plan.groups);
}

CostModel check_cost(const char* op, const Tensor& tables, const std::vector<int64_t>& layout,
                     const Tensor& plan_tables, int64_t families) {
  check_array(op, tables, {"cost_tables", ScalarType::Long, -1, 1}, plan_tables);
  if (layout.size() != kCostCounts + kCostTables) {
    fail(op, "cost_layout has ", layout.size(), " entries, expected ", kCostCounts + kCostTables);
  }
  check_counts(op, "cost_layout", layout, kCostCounts);
  const int64_t axes = layout[0], entries = layout[1], terms = layout[2], lookups = layout[3];
  const std::array<int64_t, kCostTables> lengths{
      axes,    axes + 1, entries,         entries,     terms, terms, terms,
      lookups, lookups,  2 * lookups + 1, lookups + 1, -1,    -1};
  check_offsets(op, "cost_layout", layout, kCostCounts, lengths, tables.numel());
  const auto* base = static_cast<const int64_t*>(tables.const_data_ptr());
  const auto table = [&](int k) { return base + layout[kCostCounts + k]; };
  CostModel cost{};
  cost.axes = static_cast<int32_t>(axes);
  cost.entries = static_cast<int32_t>(entries);
  cost.terms = static_cast<int32_t>(terms);
  cost.lookups = static_cast<int32_t>(lookups);
  cost.axis_fixed = table(0);
  cost.axis_start = table(1);
  cost.entry_family = table(2);
  cost.entry_count = table(3);
  cost.term_coefficient = table(4);
  cost.term_rows = table(5);
  cost.term_cols = table(6);
  cost.lookup_rows = table(7);
  cost.lookup_cols = table(8);
  cost.grid_start = table(9);
  cost.value_start = table(10);
  cost.grid = table(11);
  cost.values = table(12);
  if (tables.is_cpu()) {
    check_csr(op, "axis_start", cost.axis_start, axes, entries);
    check_range(op, "entry_family", cost.entry_family, entries, 0, families);
    check_range(op, "term_rows", cost.term_rows, terms, 0, axes);
    check_range(op, "term_cols", cost.term_cols, terms, 0, axes);
    check_lookups(op, cost, cost.values - cost.grid, base + tables.numel() - cost.values);
  }
  return cost;
}

}  // namespace ocsfast
