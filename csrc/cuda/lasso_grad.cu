#include "launch.cuh"
#include "walk.cuh"

namespace ocsfast::cuda {
namespace {

struct Lasso {
  using Reduce = Sum;
  static constexpr int kOperands = 2, kRows = 1;  // two 16-byte loads at a time, and two ahead
  static constexpr uint32_t kWrites = 2;          // the gradient
  static constexpr bool kPenalized = true, kSparse = true, kSums = false;
  static constexpr int kBlocksInFloat = 4, kBlocksInHalf = 3;
  static constexpr bool kUnrollBand = true;

  float lam;
  const PointerTable<>* grads;

  template <class T>
  struct Body {
    T* operand[kOperands];  // weight, gradient

    template <class C, int kCount>
    __device__ void change(Pack<T, kCount> (&packs)[kOperands], SlicePenalty<C> row,
                           const ColumnPenalties<C, kCount>& cols, C (&)[kCount]) const {
      C weights[kCount], grads[kCount];
      unpack(packs[0], weights);
      unpack(packs[1], grads);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const C slope = row.slope + cols.slope[k];
        grads[k] = add_slope(grads[k], weights[k], slope);
      }
      round_into(packs[1], grads);
    }
  };

  // A pruned slice of norm 0 is not active: Eq. 8's gradient is 0 there.
  template <class A>
  __device__ SlicePenalty<A> penalty(const Work& work, int32_t slice) const {
    const A slope = is_pruned(work, slice) ? compute_slope(work, slice, A(lam)) : A(0);
    return {slope, slope != A(0)};
  }
  __device__ bool walks(const Work& work, int32_t tensor) const {
    return has_slices(work.matrices[tensor]) && (*grads)(work, tensor);
  }
  template <class T>
  __device__ Body<T> body(const Work& work, int32_t tensor) const {
    return {{get_weight<T>(work, tensor), static_cast<T*>((*grads)(work, tensor))}};
  }
};

template <class T, class A>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<Lasso, T, A>)
    lasso_kernel(const __grid_constant__ Work work, const __grid_constant__ PointerTable<> grads,
                 const Number<float> lam) {
  __shared__ Shared<Lasso, T, A> shared;
  walk(work, Lasso{lam.get(), &grads}, shared);
}

void lasso_grad(const Tensor& ticket, const std::vector<Tensor>& grads, const Tensor& mask,
                const Tensor& lam, bool squares_known) {
  constexpr const char* kOp = "lasso_grad_";
  const LockedBound bound(kOp, ticket);
  const LassoArguments a = check_lasso(kOp, *bound, grads, mask, lam);
  const OnDevice here(kOp, bound->tables);
  Work work = make_work(*bound, a.mask);
  PointerTable<> pointers;
  if (!squares_known) launch_squares(kOp, *bound, here.stream());
  for_each_launch(work, *bound, kMaxTensors, [&](auto types) {
    using Type = decltype(types);
    copy_pointers(work, a.grads, pointers);
    launch_cooperative(kOp, lasso_kernel<typename Type::T, typename Type::A>, work, here.stream(), work,
                       pointers, a.lam);
  });
  record_use(kOp, *bound, here.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("lasso_grad_", TORCH_BOX(&lasso_grad));
}

}  // namespace ocsfast::cuda
