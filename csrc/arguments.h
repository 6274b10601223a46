// What the checks make of an op's arguments: plain pointers and numbers, as the kernels take them. One
// struct for each op; the CPU's and CUDA's kernels take the same. Pointers lead to where the weights
// lie: the CPU or a GPU. Host only.
#pragma once

#include <cstdint>
#include <vector>

#include "criteria.h"
#include "plan.h"

namespace ocsfast {

// A 0-dim tensor. On the CPU its value is at hand, and goes to a kernel in the kernel's argument. On the
// weights' device it may yet have to be computed, and the kernel reads it there.
template <class T>
struct Number {
  const T* on_device;  // null: it is `value`
  T value;
  OCSFAST_HOST_DEVICE T get() const { return on_device ? *on_device : value; }
};

struct SaliencyArguments {
  Criterion criterion;
  std::vector<void*> others;  // [tensors] null: no slice of the weight counts; empty: none is needed
};

struct PartitionArguments {
  Plan plan;
  CostModel cost;
  const void* scores;  // [groups] float or double
  bool in_double;
  const int64_t* limits;  // [families]
  const int64_t* budget;
  const int64_t* units;  // [families] kept counts are multiples of it; null: any count may be kept
  const int64_t* ties;   // [families] the first family it is tied to, or itself; null: none is tied
  bool give_back;
};

struct CompareArguments {
  Plan plan;
  const bool* mask;       // [groups]
  const void* sizes;      // [groups] float or double
  const int64_t* cost;    // of the mask
  const int32_t* status;  // of the mask
  const bool* first;      // [groups] of an earlier mask, for Eq. 3; the mask itself if none is given
  const bool* last;       // [groups] of an earlier mask, for what has changed; the same
};

struct ShrinkArguments {
  const bool* mask;      // [groups]
  Number<float> factor;  // Eq. 9: 1 - λ · lr
};

struct LassoArguments {
  std::vector<void*> grads;  // [tensors] null: none
  const bool* mask;          // [groups]
  Number<float> lam;         // Eq. 8's λ
};

// What the ops that take an optimizer's step have in common.
struct StepArguments {
  std::vector<void*> grads;  // [tensors] null: none, the weight takes no step
  Number<double> lr;
  const bool* mask;      // [groups]; null: no penalty
  Number<float> lam;     // Eq. 8's λ
  Number<float> factor;  // Eq. 9: 1 - λ · lr
  bool maximize;
  bool squares_known;       // Bound::slice_sq holds the sums of squares of the weights as they are now
  const float* grad_scale;  // gradients are divided by it; null: by 1
  const float* found_inf;   // not 0: the op changes no weight; null: 0
};

struct SgdArguments {
  std::vector<void*> momenta;   // [tensors]
  std::vector<uint8_t> begins;  // [tensors] whether the momentum holds nothing yet
};

struct AdamwArguments {
  std::vector<void*> averages, squares;  // [tensors] exp_avgs and exp_avg_sqs
  std::vector<float*> steps;  // [tensors] how many steps the weight has taken; null: it takes none
};

}  // namespace ocsfast
