// A plan bound to the weights it walks: checked once, so that a call costs microseconds however many
// tensors there are. Ops find it by a ticket, a CPU tensor of one int64. Host only.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "checks.h"
#include "criteria.h"

namespace ocsfast {

// Kernels that were started, and may not have run when what they use is released.
class Users {
 public:
  virtual ~Users() = default;
  // Whether memory may be released now: all that is allocated after it is used after them.
  virtual bool leave() = 0;
};

struct Bound {
  Plan plan;  // points into `tables`
  std::vector<Matrix> matrices;
  int32_t tasks = 0;
  bool wide = false;  // any weight is float64
  Tensor tables;
  std::vector<Tensor> weights;
  // Memory that kernels reuse from call to call, for sums in double on the CPU, else in the weights'
  // accumulator type.
  Tensor row_sums;     // [plan.num_rows]
  Tensor partials;     // column sums, task by task
  Tensor slice_sq;     // [plan.slices] sums of squares, as the last op that took them left them
  Tensor device;       // CUDA: the matrices, as bytes
  Tensor corrections;  // CUDA: AdamW's, [tensors, 2] in double
  std::mutex in_use;   // one op at a time: they share this memory
  std::unique_ptr<Users> users;  // CUDA: kernels that may still use it

  ~Bound();
  int64_t count_partials() const;  // elements of `partials`
};

// Checks everything that a kernel relies on. No ticket yet.
std::shared_ptr<Bound> make_bound(const std::vector<Tensor>& weights, const Tensor& tables,
                                  const Tensor& shapes, const std::vector<int64_t>& layout,
                                  Walker walker);

// Keeps it until its ticket's number is released. `shapes`: any tensor on the CPU.
Tensor issue_ticket(std::shared_ptr<Bound> bound, const Tensor& shapes);
void release(int64_t number);

// The holder of a ticket, alone: no other op can use it meanwhile. Its weights are where and what they
// were when it was bound.
class Use {
 public:
  Use(const char* op, const Tensor& ticket);
  const Bound& operator*() const { return *bound_; }
  const Bound* operator->() const { return bound_.get(); }

 private:
  std::shared_ptr<Bound> bound_;
  std::unique_lock<std::mutex> lock_;
};

// Tensors beside the weights, such as gradients, as pointers: null where the tensor is empty, which
// stands for none. Each has the dtype, shape, strides and device of its weight.
std::vector<void*> pointers_beside(const char* op, const char* name, const std::vector<Tensor>& tensors,
                                   const Bound& bound);

// The criterion of that name; group_saliency's error where there is none.
Criterion find_criterion(const std::string& name);

// Checks the arguments of group_saliency; pointers to `others` where the criterion needs them.
std::vector<void*> check_saliency(const char* op, const Bound& bound, const Tensor& scores,
                                  const Tensor& slices, const std::vector<Tensor>& others,
                                  const Criterion& criterion);

}  // namespace ocsfast
