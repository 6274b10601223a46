#include "checks.h"

#include "bound.h"

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

// Whether the tensor's dimensions, some neighbours of them flattened, are [rows, cols, inner].
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

// Whether the elements lie one behind the other in the order the plan was built for. The stride of a
// dimension of size 1 is arbitrary and is not looked at.
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
  const std::optional<DType> dtype = find_dtype(weight.scalar_type());
  if (dtype) return *dtype;
  fail(op, "weights[", index, "] is ", DTypeOf{weight},
       ", but only float32, float64, float16 and bfloat16 tensors can be pruned");
}

// One row of Plan.shapes.
struct PlannedShape {
  int64_t rows, cols, inner;
  bool channels_last;
  int64_t row_base, col_base;
};

void check_weight(const char* op, size_t index, const Tensor& weight, const PlannedShape& planned,
                  const Tensor& tables) {
  const auto& [rows, cols, inner, channels_last, row_base, col_base] = planned;
  if (!same_place(weight, tables)) {
    fail(op, "weights[", index, "] is on ", Place{weight}, ", the plan on ", Place{tables});
  }
  check_dtype(op, index, weight);
  if (!is_matrix(weight, rows, cols, inner)) {
    fail(op, "weights[", index, "] has shape ", Shape{weight}, ", the plan was built for ", rows,
         " rows, ", cols, " columns of ", inner);
  }
  if (!is_dense(weight, channels_last)) {
    fail(op, "weights[", index, "] has strides ", Strides{weight}, " for shape ", Shape{weight},
         ", the plan was built for a ", channels_last ? "channels_last" : "contiguous", " tensor");
  }
}

// -1, or the start of `extent` entries in a table of `room`.
void check_base(const char* op, size_t index, const char* axis, int64_t base, int64_t extent,
                int64_t room) {
  if (base >= -1 && (base < 0 || base + extent <= room)) return;
  fail(op, "shapes: ", axis, " base of tensor ", index, " is ", base, ", with ", extent, " of ", room,
       " entries");
}

// Torch's own number for a dtype, or a kind of device; -1 if torch cannot tell, which is no tensor's.
int32_t dtype_code(const Tensor& tensor) {
  int32_t code = 0;
  return aoti_torch_get_dtype(tensor.get(), &code) == AOTI_TORCH_SUCCESS ? code : -1;
}

int32_t device_code(const Tensor& tensor) {
  int32_t code = 0;
  return aoti_torch_get_device_type(tensor.get(), &code) == AOTI_TORCH_SUCCESS ? code : -1;
}

// The tensor has the shape, strides, dtype and place of its weight.
void check_like(const char* op, const char* name, size_t index, const Tensor& tensor,
                const Tensor& weight, const Form& form) {
  if (has_form(tensor, form)) return;
  fail(op, name, '[', index, "] is a ", DTypeOf{tensor}, " tensor of shape ", Shape{tensor},
       " and strides ", Strides{tensor}, " on ", Place{tensor}, ", its weight a ", DTypeOf{weight},
       " tensor of shape ", Shape{weight}, " and strides ", Strides{weight}, " on ", Place{weight});
}

}  // namespace

std::optional<DType> find_dtype(ScalarType dtype) {
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

template <class T>
Number<T> check_number(const char* op, const char* name, const Tensor& number, const Tensor& tables) {
  constexpr ScalarType kDType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const bool at_hand = number.is_cpu();
  if (!at_hand && !same_place(number, tables)) {
    fail(op, name, " is on ", Place{number}, ", expected cpu or the plan's ", Place{tables});
  }
  check_array(op, number, {name, kDType, 1, 0}, number);
  const T* const where = number.const_data_ptr<T>();
  return at_hand ? Number<T>{nullptr, *where} : Number<T>{where, T(0)};
}

template Number<float> check_number(const char*, const char*, const Tensor&, const Tensor&);
template Number<double> check_number(const char*, const char*, const Tensor&, const Tensor&);

Form form_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  return {{sizes.begin(), sizes.end()},
          {strides.begin(), strides.end()},
          dtype_code(tensor),
          device_code(tensor),
          tensor.get_device_index()};
}

bool has_form(const Tensor& tensor, const Form& form) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  if (sizes.size() != form.sizes.size() || dtype_code(tensor) != form.dtype ||
      device_code(tensor) != form.device_type || tensor.get_device_index() != form.device_index) {
    return false;
  }
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != form.sizes[d] || (sizes[d] != 1 && strides[d] != form.strides[d])) return false;
  }
  return true;
}

std::vector<void*> check_like_weights(const char* op, const char* name,
                                      const std::vector<Tensor>& tensors, const Bound& bound) {
  const std::vector<Tensor>& weights = bound.weights;
  if (tensors.size() != weights.size()) {
    fail(op, tensors.size(), ' ', name, ", the plan has ", weights.size(), " weights");
  }
  std::vector<void*> pointers(weights.size());
  for (size_t t = 0; t < weights.size(); ++t) {
    if (tensors[t].numel() == 0) continue;
    check_like(op, name, t, tensors[t], weights[t], bound.forms[t]);
    pointers[t] = tensors[t].mutable_data_ptr();
  }
  return pointers;
}

std::vector<Matrix> check_weights(const char* op, const std::vector<Tensor>& weights,
                                  const Tensor& tables, const Tensor& shapes, const Plan& plan,
                                  Backend backend) {
  const auto tensors = static_cast<size_t>(plan.tensors);
  if (weights.size() != tensors) fail(op, weights.size(), " weights, the plan has ", tensors);
  if (!shapes.is_cpu()) fail(op, "shapes is on ", Place{shapes}, ", expected the CPU");
  check_array(op, shapes, {"shapes", ScalarType::Int, plan.tensors * kShapeFields, 2}, shapes);
  const auto* table = static_cast<const int32_t*>(shapes.const_data_ptr());

  std::vector<Matrix> matrices(tensors);
  int64_t tasks = 0, partials = 0, elements = 0;
  for (const Tensor& weight : weights) elements += weight.numel();
  const int64_t task_elements = elements_per_task(backend, elements);
  for (size_t t = 0; t < tensors; ++t) {
    const int32_t* f = table + t * kShapeFields;
    const PlannedShape planned{f[0], f[1], f[2], f[3] != 0, f[4], f[5]};
    check_weight(op, t, weights[t], planned, tables);
    check_base(op, t, "row", planned.row_base, planned.rows, plan.num_rows);
    check_base(op, t, "column", planned.col_base, planned.cols, plan.num_cols);
    if (planned.cols * planned.inner > kMaxExtent) {
      fail(op, "weights[", t, "] has rows of ", planned.cols * planned.inner, " elements, ", kMaxExtent,
           " at most are supported");
    }
    Matrix& m = matrices[t];
    m.weight = weights[t].mutable_data_ptr();
    m.elements = weights[t].numel();
    m.dtype = check_dtype(op, t, weights[t]);
    m.row_base = f[4];
    m.col_base = f[5];
    divide_into_tasks(m, planned.rows, planned.cols, planned.inner, planned.channels_last, backend,
                      task_elements);
    m.first_task = static_cast<int32_t>(tasks);
    m.first_partial = partials;
    tasks += m.tasks;
    if (m.col_base >= 0) partials += static_cast<int64_t>(m.tasks) * planned.cols;
    if (tasks > kMaxExtent) fail(op, "the weights have ", tasks, " tasks, too many");
  }
  return matrices;
}

// Runs at every call, so it asks only what `tensor.data = ...` can change.
void check_unchanged(const char* op, const Bound& bound) {
  for (size_t t = 0; t < bound.weights.size(); ++t) {
    const Tensor& weight = bound.weights[t];
    const Matrix& m = bound.matrices[t];
    const bool unchanged =
        weight.numel() == m.elements && (m.elements == 0 || weight.const_data_ptr() == m.weight) &&
        device_code(weight) == bound.forms[t].device_type && dtype_code(weight) == bound.forms[t].dtype;
    if (!unchanged) {
      fail(op, "weights[", t, "] was given other memory, another size, dtype or device since the plan ",
           "was bound to it. Bind the plan again");
    }
  }
}

}  // namespace ocsfast
