#include "launch.cuh"
#include "walk.cuh"

namespace ocsfast::cuda {
namespace {

struct Shrink {
  using Reduce = Sum;
  static constexpr int kOperands = 1, kRows = 2;  // two 16-byte loads at a time, and two ahead
  static constexpr uint32_t kWrites = 1;
  static constexpr bool kPenalized = true, kSparse = true, kSums = true;
  static constexpr int kBlocksInFloat = 3, kBlocksInHalf = 3;
  static constexpr bool kUnrollBand = true;

  float factor;

  template <class T>
  struct Body {
    T* operand[kOperands];
    accumulator_t<T> factor;

    template <class C, int kCount>
    __device__ void change(Pack<T, kCount> (&packs)[kOperands], SlicePenalty<C> row,
                           const ColumnPenalties<C, kCount>& cols, C (&terms)[kCount]) const {
      C weights[kCount];
      unpack(packs[0], weights);
      scale_pruned(weights, factor, row.active, cols.active);
      round_into(packs[0], weights);
#pragma unroll
      for (int k = 0; k < kCount; ++k) terms[k] = weights[k] * weights[k];
    }
  };

  template <class A>
  __device__ SlicePenalty<A> penalty(const Work& work, int32_t slice) const {
    return {A(0), is_pruned(work, slice)};
  }
  __device__ bool walks(const Work& work, int32_t tensor) const {
    return has_slices(work.matrices[tensor]);
  }
  template <class T>
  __device__ Body<T> body(const Work& work, int32_t tensor) const {
    return {{get_weight<T>(work, tensor)}, factor};
  }
};

template <class T, class A>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<Shrink, T, A>)
    shrink_kernel(const __grid_constant__ Work work, const Number<float> factor) {
  __shared__ Shared<Shrink, T, A> shared;
  const auto grid = cooperative_groups::this_grid();
  walk(work, Shrink{factor.get()}, shared);
  if (!work.gathers) return;
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
  Work work = make_work(*bound, a.mask);
  for_each_launch(work, *bound, bound->matrices.size(), [&](auto types) {
    using Type = decltype(types);
    launch_cooperative(kOp, shrink_kernel<typename Type::T, typename Type::A>, work, here.stream(), work,
                       a.factor);
  });
  record_use(kOp, *bound, here.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("shrink_", TORCH_BOX(&shrink));
}

}  // namespace ocsfast::cuda
