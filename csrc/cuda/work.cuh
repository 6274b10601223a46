// What every kernel over the weights is given: the plan, the matrices, scratch memory, and pointers to
// tensors like the weights.
#pragma once

#include "lane.cuh"

namespace ocsfast::cuda {

struct Work {
  Plan plan;
  const Matrix* matrices;  // [plan.tensors] on the device
  const Task* tasks;       // all of them, on the device
  void* row_sums;          // [num_rows] accumulators
  void* partials;          // accumulators: each task's column sums
  void* slice_sq;          // [slices] accumulators
  const bool* mask;        // [groups] to prune; null: none
  // This launch walks those of the tensors first_tensor .. first_tensor + tensors - 1 that have the
  // kernel's element type.
  int32_t first_tensor, tensors, first_task, num_tasks;
  bool gathers;      // the last launch for these tensors: their slices are summed after it
  bool last_launch;  // no launch for further tensors follows
};

// Gradients and optimizer states are other tensors at every call, so their pointers go by value in the
// kernel's argument: a copy to the device ahead of each launch would cost one more. An argument has room
// for 32 764 bytes, hence 1984 tensors a launch where a kernel takes two pointers for each: 2 × 1984 × 8
// = 31 744 bytes. Larger models take several launches.
constexpr int kArgumentBytes = 32764;
#ifdef OCSFAST_MOST_TENSORS  // tests: so few that a small plan takes several launches
constexpr int kMaxTensors = OCSFAST_MOST_TENSORS;
#else
constexpr int kMaxTensors = 1984;
#endif

// One pointer for each tensor of a launch; null: none.
template <int kTensors = kMaxTensors>
struct PointerTable {
  void* pointer[kTensors];
  __device__ void* operator()(const Work& work, int32_t tensor) const {
    void* const found = pointer[tensor - work.first_tensor];
    if (found) __builtin_assume(__isGlobal(found));
    return found;
  }
};

// The assumption keeps the compiler from testing for shared memory: it cannot tell where an address that
// was read from memory leads.
template <class T>
__device__ T* get_weight(const Work& work, int32_t tensor) {
  void* const weight = work.matrices[tensor].weight;
  __builtin_assume(__isGlobal(weight));
  return static_cast<T*>(weight);
}

__device__ inline bool is_pruned(const Work& work, int32_t slice) {
  return slice >= 0 && work.mask[work.plan.slice_group[slice]];
}

// Per row or column: does the op change elements of its slice (it does where the slice is pruned), and
// Eq. 8's slope, λ / ‖slice‖.
template <class A>
struct SlicePenalty {
  A slope;
  bool active;
};

// λ / ‖slice‖ of Eq. 8; 0 where the norm is 0.
template <class A>
__device__ A compute_slope(const Work& work, int32_t slice, A lam) {
  const A square = static_cast<const A*>(work.slice_sq)[slice];
  return square != A(0) ? lam / sqrt(square) : A(0);
}

}  // namespace ocsfast::cuda
