#include "launch.cuh"
#include "score.cuh"

namespace ocsfast::cuda {
namespace {

struct Lasso {
  using Join = Add;
  static constexpr int kStreams = 2, kUnroll = 2;
  static constexpr uint32_t kWrites = 2;
  static constexpr bool kPenalized = true, kSparse = true, kSums = false;

  const float* strength;
  const Beside<>* grads;

  template <class T>
  struct Step {
    T* stream[kStreams];

    template <class C>
    __device__ C change(T (&element)[kStreams], Label<C> row, Label<C> col) const {
      const C slope = row.slope + col.slope;
      element[1] = from_number<T>(to_number(element[1]) + to_number(element[0]) * slope);
      return C(0);
    }
  };

  template <class A>
  __device__ Label<A> label(const Work& work, int32_t slice) const {
    const A slope = is_pruned(work, slice) ? slope_of(work, slice, A(*strength)) : A(0);
    return {slope != A(0), slope};
  }
  __device__ bool walks(const Work& work, int32_t tensor) const {
    return has_slices(work.matrices[tensor]) && (*grads)(work, tensor);
  }
  template <class T>
  __device__ Step<T> start(const Work& work, int32_t tensor) const {
    return {{weight_of<T>(work, tensor), static_cast<T*>((*grads)(work, tensor))}};
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<A>)
    lasso_kernel(const __grid_constant__ Work work, const __grid_constant__ Beside<> grads,
                 const float* strength, bool known) {
  __shared__ Shared<A> shared;
  if (!known) take_squares<A>(work, shared);
  walk<A>(work, Lasso{strength, &grads}, shared);
}

void lasso_grad(const Tensor& ticket, const std::vector<Tensor>& grads, const Tensor& mask,
                const Tensor& lam, bool known) {
  constexpr const char* kOp = "lasso_grad_";
  const LockedBound bound(kOp, ticket);
  const LassoArguments a = check_lasso(kOp, *bound, grads, mask, lam);
  const OnDevice here(kOp, bound->tables);
  Work work = make_work(*bound, a.mask);
  Beside<> beside;
  for_each_window(work, *bound, kMostTensors, [&] {
    copy_pointers(work, a.grads, beside);
    launch_cooperative(kOp, bound->any_double ? lasso_kernel<double> : lasso_kernel<float>, work,
                       here.stream(), work, beside, a.lam, known);
  });
  used_on(kOp, *bound, here.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("lasso_grad_", TORCH_BOX(&lasso_grad));
}

}  // namespace ocsfast::cuda
