#include "bound.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <iterator>
#include <unordered_map>

namespace ocsfast {
namespace {

// Everything that is bound and not released, by the number in its ticket.
struct Register {
  std::mutex mutex;
  int64_t last = 0;  // the last number given out
  std::unordered_map<int64_t, std::shared_ptr<Bound>> held;
};

Register& get_register() {
  static auto* const instance = new Register;  // never destroyed: Python may release while it exits
  return *instance;
}

}  // namespace

Bound::~Bound() {
  if (!pending || pending->allow_free()) return;
  // A captured graph may be replayed at any time, and nothing tells when it no longer will be. So what
  // its kernels write to is never freed: a few per cent of the weights' size.
  static auto* const mutex = new std::mutex;
  static auto* const kept = new std::vector<Tensor>;
  const std::lock_guard<std::mutex> lock(*mutex);
  kept->insert(kept->end(),
               {tables, row_sums, partials, slice_sq, device_matrices, device_tasks, bias_corrections});
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
                                  Backend backend) {
  constexpr const char* kOp = "bind";
  auto bound = std::make_shared<Bound>();
  bound->plan = check_plan(kOp, tables, layout);
  bound->matrices = check_weights(kOp, weights, tables, shapes, bound->plan, backend);
  const Tensor host =
      torch::stable::to(tables, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  check_entries(kOp, check_plan(kOp, host, layout), bound->matrices);
  bound->tables = torch::stable::clone(tables);  // a copy: nobody can write into what was checked
  bound->plan = check_plan(kOp, bound->tables, layout);
  for (const Matrix& m : bound->matrices) {
    bound->tasks += m.tasks;
    bound->any_double = bound->any_double || m.dtype == DType::kDouble;
  }
  bound->weights = weights;
  std::transform(weights.begin(), weights.end(), std::back_inserter(bound->forms), form_of);
  const bool in_double = bound->any_double || backend == Backend::kCpu;
  const ScalarType dtype = in_double ? ScalarType::Double : ScalarType::Float;
  bound->row_sums = torch::stable::new_empty(tables, {bound->plan.num_rows}, dtype);
  bound->partials = torch::stable::new_empty(tables, {bound->count_partials()}, dtype);
  bound->slice_sq = torch::stable::new_empty(tables, {bound->plan.slices}, dtype);
  return bound;
}

Tensor issue_ticket(std::shared_ptr<Bound> bound, const Tensor& shapes) {
  Tensor ticket = torch::stable::new_empty(shapes, {}, ScalarType::Long);
  Register& all = get_register();
  const std::lock_guard<std::mutex> lock(all.mutex);
  *ticket.mutable_data_ptr<int64_t>() = ++all.last;
  all.held.emplace(all.last, std::move(bound));
  return ticket;
}

void release(int64_t number) {
  Register& all = get_register();
  std::shared_ptr<Bound> last;  // declared first, so that it is destroyed after the lock
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.held.find(number);
  if (found == all.held.end()) return;
  last = std::move(found->second);
  all.held.erase(found);
}

LockedBound::LockedBound(const char* op, const Tensor& ticket) {
  const int64_t number = check_ticket(op, ticket);
  {
    Register& all = get_register();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.held.find(number);
    if (found != all.held.end()) bound_ = found->second;
  }
  if (!bound_) fail(op, "nothing is bound under ", number, ": it was released. Bind the plan again");
  lock_ = std::unique_lock<std::mutex>(bound_->mutex);
  check_unchanged(op, *bound_);
}

}  // namespace ocsfast
