#include "launch.cuh"
#include "score.cuh"

namespace ocsfast::cuda {
namespace {

struct Lasso {
  using Reduce = Sum;
  static constexpr int kOperands = 2, kUnroll = 2;  // four 16-byte loads of a thread are in flight
  static constexpr uint32_t kWrites = 2;            // the gradient
  static constexpr bool kPenalized = true, kSparse = true, kSums = false;

  float lam;
  const PointerTable<>* grads;

  template <class T>
  struct Body {
    T* operand[kOperands];  // weight, gradient

    template <class C>
    __device__ C change(T (&element)[kOperands], SlicePenalty<C> row, SlicePenalty<C> col) const {
      const C slope = row.slope + col.slope;
      element[1] = from_number<T>(to_number(element[1]) + to_number(element[0]) * slope);
      return C(0);
    }
  };

  // A pruned slice of norm 0 is not active: Eq. 8's gradient is 0 there.
  template <class A>
  __device__ SlicePenalty<A> penalty(const Work& work, int32_t slice) const {
    const A slope = is_pruned(work, slice) ? compute_slope(work, slice, A(lam)) : A(0);
    return {slope != A(0), slope};
  }
  __device__ bool walks(const Work& work, int32_t tensor) const {
    return has_slices(work.matrices[tensor]) && (*grads)(work, tensor);
  }
  template <class T>
  __device__ Body<T> body(const Work& work, int32_t tensor) const {
    return {{get_weight<T>(work, tensor), static_cast<T*>((*grads)(work, tensor))}};
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<A>)
    lasso_kernel(const __grid_constant__ Work work, const __grid_constant__ PointerTable<> grads,
                 const Number<float> lam, bool squares_known) {
  __shared__ Shared<A> shared;
  if (!squares_known) compute_squares<A>(work, shared);
  walk<A>(work, Lasso{lam.get(), &grads}, shared);
}

void lasso_grad(const Tensor& ticket, const std::vector<Tensor>& grads, const Tensor& mask,
                const Tensor& lam, bool squares_known) {
  constexpr const char* kOp = "lasso_grad_";
  const LockedBound bound(kOp, ticket);
  const LassoArguments a = check_lasso(kOp, *bound, grads, mask, lam);
  const OnDevice here(kOp, bound->tables);
  Work work = make_work(*bound, a.mask);
  PointerTable<> pointers;
  for_each_window(work, *bound, kMaxTensors, [&] {
    copy_pointers(work, a.grads, pointers);
    launch_cooperative(kOp, bound->any_double ? lasso_kernel<double> : lasso_kernel<float>, work,
                       here.stream(), work, pointers, a.lam, squares_known);
  });
  record_use(kOp, *bound, here.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("lasso_grad_", TORCH_BOX(&lasso_grad));
}

}  // namespace ocsfast::cuda
