#include "bound.h"

#include <torch/csrc/stable/ops.h>

#include <unordered_map>

namespace ocsfast {
namespace {

// All that is bound and not released. A number instead of a pointer, so that no ticket, not even a
// made-up one, can lead to memory that is gone.
struct Register {
  std::mutex mutex;
  int64_t last = 0;
  std::unordered_map<int64_t, std::shared_ptr<Bound>> held;
};

Register& all_bound() {
  static auto* const instance = new Register;  // never destroyed: Python may release at its very end
  return *instance;
}

int64_t number_of(const char* op, const Tensor& ticket) {
  check_array(op, ticket, {"bound", ScalarType::Long, 1, 0}, ticket);
  if (!ticket.is_cpu()) fail(op, "bound must lie on the CPU");
  return *ticket.const_data_ptr<int64_t>();
}

// Every call pays for this: it asks only what can change in place, by `tensor.data = ...`.
bool is_as_bound(const Tensor& weight, const Matrix& m, const Tensor& tables) {
  return weight.numel() == m.elements && (m.elements == 0 || weight.const_data_ptr() == m.weight) &&
         weight.is_cpu() == tables.is_cpu() && dtype_of(weight.scalar_type()) == m.dtype;
}

}  // namespace

Bound::~Bound() {
  if (!users || users->leave()) return;
  // A captured graph may be replayed at any time, and nobody tells when it no longer will be: what its
  // kernels write to, a few per cent of the weights, stays.
  static auto* const mutex = new std::mutex;
  static auto* const kept = new std::vector<Tensor>;
  const std::lock_guard<std::mutex> lock(*mutex);
  kept->insert(kept->end(), {tables, row_sums, partials, slice_sq, device, corrections});
}

int64_t Bound::count_partials() const {
  int64_t count = 0;
  for (const Matrix& m : matrices) {
    if (m.col_base >= 0) count += static_cast<int64_t>(m.tasks) * m.cols;
  }
  return count;
}

std::shared_ptr<Bound> make_bound(const std::vector<Tensor>& weights, const Tensor& tables,
                                  const Tensor& shapes, const std::vector<int64_t>& layout,
                                  Walker walker) {
  constexpr const char* kOp = "bind";
  auto bound = std::make_shared<Bound>();
  bound->plan = check_plan(kOp, tables, layout);
  bound->matrices = check_weights(kOp, weights, tables, shapes, bound->plan, walker);
  const Tensor host =
      torch::stable::to(tables, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  check_entries(kOp, check_plan(kOp, host, layout), bound->matrices);
  bound->tables = torch::stable::clone(tables);  // so that nobody writes into what was checked
  bound->plan = check_plan(kOp, bound->tables, layout);
  for (const Matrix& m : bound->matrices) {
    bound->tasks += m.tasks;
    bound->wide = bound->wide || m.dtype == DType::kDouble;
  }
  bound->weights = weights;
  const bool in_double = bound->wide || walker == Walker::kCpu;
  const ScalarType dtype = in_double ? ScalarType::Double : ScalarType::Float;
  bound->row_sums = torch::stable::new_empty(tables, {bound->plan.num_rows}, dtype);
  bound->partials = torch::stable::new_empty(tables, {bound->count_partials()}, dtype);
  bound->slice_sq = torch::stable::new_empty(tables, {bound->plan.slices}, dtype);
  return bound;
}

Tensor issue_ticket(std::shared_ptr<Bound> bound, const Tensor& shapes) {
  Tensor ticket = torch::stable::new_empty(shapes, {}, ScalarType::Long);
  Register& all = all_bound();
  const std::lock_guard<std::mutex> lock(all.mutex);
  *ticket.mutable_data_ptr<int64_t>() = ++all.last;
  all.held.emplace(all.last, std::move(bound));
  return ticket;
}

void release(int64_t number) {
  Register& all = all_bound();
  std::shared_ptr<Bound> last;  // destroyed when the lock is gone
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.held.find(number);
  if (found == all.held.end()) return;
  last = std::move(found->second);
  all.held.erase(found);
}

Use::Use(const char* op, const Tensor& ticket) {
  const int64_t number = number_of(op, ticket);
  {
    Register& all = all_bound();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.held.find(number);
    if (found != all.held.end()) bound_ = found->second;
  }
  if (!bound_) fail(op, "nothing is bound under ", number, ": it was released. Bind the plan again");
  lock_ = std::unique_lock<std::mutex>(bound_->in_use);
  for (size_t t = 0; t < bound_->weights.size(); ++t) {
    if (!is_as_bound(bound_->weights[t], bound_->matrices[t], bound_->tables)) {
      fail(op, "weights[", t, "] was given other memory, another size, dtype or device since the plan ",
           "was bound to it. Bind the plan again");
    }
  }
}

std::vector<void*> pointers_beside(const char* op, const char* name, const std::vector<Tensor>& tensors,
                                   const Bound& bound) {
  const std::vector<Tensor>& weights = bound.weights;
  if (tensors.size() != weights.size()) {
    fail(op, tensors.size(), ' ', name, ", the plan has ", weights.size(), " weights");
  }
  std::vector<void*> pointers(weights.size());
  for (size_t t = 0; t < weights.size(); ++t) {
    if (tensors[t].numel() == 0) continue;
    check_beside(op, name, t, tensors[t], weights[t]);
    pointers[t] = tensors[t].mutable_data_ptr();
  }
  return pointers;
}

Criterion find_criterion(const std::string& name) {
  for (const Criterion& criterion : kCriteria) {
    if (criterion.name == name) return criterion;
  }
  fail("group_saliency", "criterion '", name, "' is not known");
}

std::vector<void*> check_saliency(const char* op, const Bound& bound, const Tensor& scores,
                                  const Tensor& slices, const std::vector<Tensor>& others,
                                  const Criterion& criterion) {
  const ScalarType dtype = bound.wide ? ScalarType::Double : ScalarType::Float;
  check_array(op, scores, {"scores", dtype, bound.plan.groups, 1}, bound.tables);
  check_array(op, slices, {"slices", dtype, bound.plan.slices, 1}, bound.tables);
  if (!criterion.needs_other) return {};
  return pointers_beside(op, "others", others, bound);
}

}  // namespace ocsfast
