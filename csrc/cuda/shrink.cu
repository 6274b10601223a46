#include "launch.cuh"
#include "walk.cuh"

namespace ocsfast::cuda {
namespace {

struct Shrink {
  using Reduce = Sum;
  static constexpr int kOperands = 1, kUnroll = 4;  // four 16-byte loads of a thread are in flight
  static constexpr uint32_t kWrites = 1;
  static constexpr bool kPenalized = true, kSparse = true, kSums = true;

  float factor;

  template <class T>
  struct Body {
    T* operand[kOperands];
    accumulator_t<T> factor;

    template <class C>
    __device__ C change(T (&element)[kOperands], SlicePenalty<C> row, SlicePenalty<C> col) const {
      const C scale = row.active && col.active ? factor * factor : factor;
      element[0] = from_number<T>(to_number(element[0]) * scale);
      const C stored = to_number(element[0]);
      return stored * stored;
    }
  };

  template <class A>
  __device__ SlicePenalty<A> penalty(const Work& work, int32_t slice) const {
    return {is_pruned(work, slice), A(0)};
  }
  __device__ bool walks(const Work& work, int32_t tensor) const {
    return has_slices(work.matrices[tensor]);
  }
  template <class T>
  __device__ Body<T> body(const Work& work, int32_t tensor) const {
    return {{get_weight<T>(work, tensor)}, factor};
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<A>)
    shrink_kernel(const __grid_constant__ Work work, const Number<float> factor) {
  __shared__ Shared<A> shared;
  const auto grid = cooperative_groups::this_grid();
  walk<A>(work, Shrink{factor.get()}, shared);
  grid.sync();
  gather_slices<Sum, A>(
      work, true, [](int32_t) { return true; }, static_cast<A*>(work.slice_sq),
      static_cast<A*>(nullptr));
}

void shrink(const Tensor& ticket, const Tensor& mask, const Tensor& factor) {
  constexpr const char* kOp = "shrink_";
  const LockedBound bound(kOp, ticket);
  const ShrinkArguments a = check_shrink(kOp, *bound, mask, factor);
  const OnDevice here(kOp, bound->tables);
  const Work work = make_work(*bound, a.mask);
  launch_cooperative(kOp, bound->any_double ? shrink_kernel<double> : shrink_kernel<float>, work,
                     here.stream(), work, a.factor);
  record_use(kOp, *bound, here.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("shrink_", TORCH_BOX(&shrink));
}

}  // namespace ocsfast::cuda
