#include "checks.h"

#include <array>

namespace ocsfast {
namespace {

constexpr int64_t kMaxExtent = INT32_MAX;

struct Shape {
  const Tensor& tensor;
};

std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '(';
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) out << (d ? ", " : "") << shape.tensor.size(d);
  return out << ')';
}

struct Strides {
  const Tensor& tensor;
};

std::ostream& operator<<(std::ostream& out, const Strides& strides) {
  out << '(';
  for (int64_t d = 0; d < strides.tensor.dim(); ++d) out << (d ? ", " : "") << strides.tensor.stride(d);
  return out << ')';
}

struct DTypeOf {
  const Tensor& tensor;
};

std::ostream& operator<<(std::ostream& out, const DTypeOf& dtype) {
  return out << torch::headeronly::toString(dtype.tensor.scalar_type());
}

struct Place {
  const Tensor& tensor;
};

std::ostream& operator<<(std::ostream& out, const Place& place) {
  if (place.tensor.is_cpu()) return out << "cpu";
  return out << (place.tensor.is_cuda() ? "cuda:" : "device ") << place.tensor.get_device_index();
}

bool same_place(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         (a.is_cpu() || a.get_device_index() == b.get_device_index());
}

// Whether [rows, cols, inner] are the tensor's dimensions, neighbours flattened.
bool is_matrix(const Tensor& tensor, int64_t rows, int64_t cols, int64_t inner) {
  if (tensor.numel() != rows * cols * inner) return false;
  bool has_rows = rows == 1, has_cols = rows * cols == 1;
  int64_t leading = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    leading *= tensor.size(d);
    has_rows = has_rows || leading == rows;
    has_cols = has_cols || leading == rows * cols;
  }
  return has_rows && has_cols;
}

// Whether the elements lie one behind the other, in the order the plan says. Strides of dimensions
// of size 1 say nothing.
bool is_dense(const Tensor& tensor, bool channels_last) {
  const int64_t dims = tensor.dim();
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
    return true;
  };
  if (tensor.numel() == 0) return true;
  if (channels_last && (dims < 2 || !fits(1))) return false;
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (channels_last && d == 1) continue;
    if (!fits(d)) return false;
  }
  return true;
}

DType check_dtype(const char* op, size_t index, const Tensor& weight) {
  const std::optional<DType> dtype = dtype_of(weight.scalar_type());
  if (dtype) return *dtype;
  fail(op, "weights[", index, "] is ", DTypeOf{weight},
       ", but only float32, float64, float16 and bfloat16 tensors can be pruned");
}

// The tables' starts ascend and leave each table the room its count needs.
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
  bool inside = true;  // a loop without a branch: tables are read at every call
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

}  // namespace

void check_array(const char* op, const Tensor& tensor, const Expected& expected, const Tensor& tables) {
  const auto& [name, dtype, numel, dim] = expected;
  if (tensor.scalar_type() != dtype) {
    fail(op, name, " is ", DTypeOf{tensor}, ", expected ", torch::headeronly::toString(dtype));
  }
  if (!same_place(tensor, tables)) {
    fail(op, name, " is on ", Place{tensor}, ", the plan on ", Place{tables});
  }
  if (tensor.dim() != dim || (numel >= 0 && tensor.numel() != numel)) {
    if (dim == 0) fail(op, name, " has shape ", Shape{tensor}, ", expected a 0-dim tensor");
    if (dim == 2) fail(op, name, " has shape ", Shape{tensor}, ", expected ", numel, " elements");
    fail(op, name, " has shape ", Shape{tensor}, ", expected (", numel, ",)");
  }
  if (!tensor.is_contiguous())
    fail(op, name, " has strides ", Strides{tensor}, ", expected a contiguous tensor");
}

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
  check_families(op, plan);
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

void check_families(const char* op, const Plan& plan) {
  check_csr(op, "family_start", plan.family_start, plan.families, plan.groups);
}

CostModel check_cost(const char* op, const Tensor& tables, const std::vector<int64_t>& layout,
                     const Tensor& plan_tables, int64_t families) {
  check_array(op, tables, {"cost_tables", ScalarType::Long, -1, 1}, plan_tables);
  if (layout.size() != kCostCounts + kCostTables) {
    fail(op, "cost_layout has ", layout.size(), " entries, expected ", kCostCounts + kCostTables);
  }
  check_counts(op, "cost_layout", layout, kCostCounts);
  const int64_t axes = layout[0], entries = layout[1], terms = layout[2];
  const std::array<int64_t, kCostTables> lengths{axes, axes + 1, entries, entries, terms, terms, terms};
  check_offsets(op, "cost_layout", layout, kCostCounts, lengths, tables.numel());
  const auto* base = static_cast<const int64_t*>(tables.const_data_ptr());
  const auto table = [&](int k) { return base + layout[kCostCounts + k]; };
  const CostModel cost{static_cast<int32_t>(axes),
                       static_cast<int32_t>(entries),
                       static_cast<int32_t>(terms),
                       table(0),
                       table(1),
                       table(2),
                       table(3),
                       table(4),
                       table(5),
                       table(6)};
  if (tables.is_cpu()) {
    check_csr(op, "axis_start", cost.axis_start, axes, entries);
    check_range(op, "entry_family", cost.entry_family, entries, 0, families);
    check_range(op, "term_rows", cost.term_rows, terms, 0, axes);
    check_range(op, "term_cols", cost.term_cols, terms, 0, axes);
  }
  return cost;
}

void check_partition(const char* op, const Tensor& scores, const Tensor& limits, int64_t round_to,
                     const Tensor& budget, const Tensor& tables, const Plan& plan) {
  const bool wide = scores.scalar_type() == ScalarType::Double;
  check_array(op, scores, {"scores", wide ? ScalarType::Double : ScalarType::Float, plan.groups, 1},
              tables);
  check_array(op, limits, {"limits", ScalarType::Long, plan.families, 1}, tables);
  check_array(op, budget, {"budget", ScalarType::Long, 1, 0}, tables);
  if (round_to < 1 || round_to > kMaxExtent) fail(op, "round_to is ", round_to, ", expected 1 or more");
}

std::optional<DType> dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return {};
  }
}

void check_beside(const char* op, const char* name, size_t index, const Tensor& tensor,
                  const Tensor& weight) {
  bool same = tensor.dim() == weight.dim() && tensor.scalar_type() == weight.scalar_type() &&
              same_place(tensor, weight);
  for (int64_t d = 0; same && d < weight.dim(); ++d) {
    same = tensor.size(d) == weight.size(d) &&
           (tensor.size(d) == 1 || tensor.stride(d) == weight.stride(d));
  }
  if (same) return;
  fail(op, name, '[', index, "] is a ", DTypeOf{tensor}, " tensor of shape ", Shape{tensor},
       " and strides ", Strides{tensor}, " on ", Place{tensor}, ", its weight a ", DTypeOf{weight},
       " tensor of shape ", Shape{weight}, " and strides ", Strides{weight}, " on ", Place{weight});
}

std::vector<Matrix> check_weights(const char* op, const std::vector<Tensor>& weights,
                                  const Tensor& tables, const Tensor& shapes, const Plan& plan,
                                  Walker walker) {
  const auto tensors = static_cast<size_t>(plan.tensors);
  if (weights.size() != tensors) fail(op, weights.size(), " weights, the plan has ", tensors);
  if (!shapes.is_cpu()) fail(op, "shapes is on ", Place{shapes}, ", expected the CPU");
  check_array(op, shapes, {"shapes", ScalarType::Int, plan.tensors * kShapeFields, 2}, shapes);
  const auto* table = static_cast<const int32_t*>(shapes.const_data_ptr());

  std::vector<Matrix> matrices(tensors);
  int64_t tasks = 0, partials = 0;
  for (size_t t = 0; t < tensors; ++t) {
    const int32_t* fields = table + t * kShapeFields;
    const int64_t rows = fields[0], cols = fields[1], inner = fields[2];
    const bool channels_last = fields[3] != 0;
    const Tensor& weight = weights[t];
    Matrix& m = matrices[t];
    if (!same_place(weight, tables)) {
      fail(op, "weights[", t, "] is on ", Place{weight}, ", the plan on ", Place{tables});
    }
    m.dtype = check_dtype(op, t, weight);
    if (!is_matrix(weight, rows, cols, inner)) {
      fail(op, "weights[", t, "] has shape ", Shape{weight}, ", the plan was built for ", rows,
           " rows, ", cols, " columns of ", inner);
    }
    if (!is_dense(weight, channels_last)) {
      fail(op, "weights[", t, "] has strides ", Strides{weight}, " for shape ", Shape{weight},
           ", the plan was built for a ", channels_last ? "channels_last" : "contiguous", " tensor");
    }
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t base = fields[4 + axis], extent = fields[axis];
      const int64_t room = axis == 0 ? plan.num_rows : plan.num_cols;
      if (base < -1 || (base >= 0 && base + extent > room)) {
        fail(op, "shapes: ", axis == 0 ? "row" : "column", " base of tensor ", t, " is ", base,
             ", with ", extent, " of ", room, " entries");
      }
    }
    if (cols * inner > kMaxExtent) {
      fail(op, "weights[", t, "] has rows of ", cols * inner, " elements, ", kMaxExtent,
           " at most are supported");
    }
    m.weight = weight.mutable_data_ptr();
    m.elements = weight.numel();
    m.row_base = fields[4];
    m.col_base = fields[5];
    if (has_slices(m)) {
      m.rows = static_cast<int32_t>(rows);
      m.cols = static_cast<int32_t>(cols);
      m.bands = static_cast<int32_t>(channels_last ? inner : 1);
      m.run = static_cast<int32_t>(channels_last ? 1 : inner);
      m.width = m.cols * m.run;
      m.rows_per_task =
          rows_per_task(rows, cols, inner,
                        walker == Walker::kCpu ? kRunsPerColumnCpu * m.run : kElementsPerColumnCuda);
    } else {
      m.rows = static_cast<int32_t>((m.elements + kTaskElements - 1) / kTaskElements);
      m.cols = m.width = kTaskElements;
      m.bands = m.run = m.rows_per_task = 1;
    }
    m.first_task = static_cast<int32_t>(tasks);
    m.tasks = m.elements == 0
                  ? 0
                  : static_cast<int32_t>((static_cast<int64_t>(m.rows) + m.rows_per_task - 1) /
                                         m.rows_per_task);
    m.first_partial = partials;
    tasks += m.tasks;
    if (m.col_base >= 0) partials += static_cast<int64_t>(m.tasks) * cols;
    if (tasks > kMaxExtent) fail(op, "the weights have ", tasks, " tasks, too many");
  }
  return matrices;
}

}  // namespace ocsfast
