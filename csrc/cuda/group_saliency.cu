#include "launch.cuh"
#include "score.cuh"

namespace ocsfast::cuda {
namespace {

struct Output {
  void* scores;  // [groups] accumulators
  void* slices;  // [slices] accumulators
  Finish finish;
};

// In the place of a PointerTable, for an element that needs no other tensor.
struct NoPointers {};

template <class A>
__device__ A finish(Finish how, A sum, int32_t size) {
  switch (how) {
    case Finish::kRootMeanSquare:
      return finish_slice<Finish::kRootMeanSquare>(sum, size);
    case Finish::kSquareOverRoot:
      return finish_slice<Finish::kSquareOverRoot>(sum, size);
    case Finish::kMean:
      return finish_slice<Finish::kMean>(sum, size);
    case Finish::kAbsolute:
      return finish_slice<Finish::kAbsolute>(sum, size);
    case Finish::kHalf:
      return finish_slice<Finish::kHalf>(sum, size);
    default:
      return sum;
  }
}

template <class A>
__device__ void score_groups(const Plan& plan, const Output& out, const A* slices) {
  for (int64_t g = blockIdx.x * kThreads + threadIdx.x; g < plan.groups; g += gridDim.x * kThreads) {
    const int32_t begin = plan.group_start[g], end = plan.group_start[g + 1];
    A sum = 0;
    for (int32_t k = begin; k < end; ++k) {
      const int32_t slice = plan.group_slice[k];
      sum += finish(out.finish, slices[slice], plan.slice_size[slice]);
    }
    static_cast<A*>(out.scores)[g] = sum / static_cast<A>(max(1, end - begin));
  }
}

template <class A, Element kElement, class Others>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<A>)
    saliency_kernel(const __grid_constant__ Work work, const __grid_constant__ Output out,
                    const __grid_constant__ Others others) {
  __shared__ Shared<A> shared;
  const auto grid = cooperative_groups::this_grid();
  Score<kElement> score{};
  if constexpr (needs_other(kElement)) score.others = &others;
  walk<A>(work, score, shared);
  grid.sync();
  A* slices = static_cast<A*>(out.slices);
  A* squares = kElement == Element::kSquare ? static_cast<A*>(work.slice_sq) : nullptr;
  gather_slices<typename Score<kElement>::Reduce, A>(
      work, false, [&](int32_t tensor) { return score.has_operands(work, tensor); }, slices, squares);
  if (!work.last_launch) return;
  grid.sync();
  score_groups<A>(work.plan, out, slices);
}

// Where the sums of squares are known: no weight is read.
template <class A>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Work work, const __grid_constant__ Output out) {
  const A* squares = static_cast<const A*>(work.slice_sq);
  for (int64_t s = blockIdx.x * kThreads + threadIdx.x; s < work.plan.slices; s += gridDim.x * kThreads)
    static_cast<A*>(out.slices)[s] = squares[s];
  score_groups<A>(work.plan, out, squares);
}

template <class A, Element kElement>
void run(const char* op, const Bound& bound, const Output& out, const std::vector<void*>& others,
         cudaStream_t stream) {
  Work work = make_work(bound, nullptr);
  if constexpr (needs_other(kElement)) {
    PointerTable<> pointers;
    for_each_window(work, bound, kMaxTensors, [&] {
      copy_pointers(work, others, pointers);
      launch_cooperative(op, saliency_kernel<A, kElement, PointerTable<>>, work, stream, work, out,
                         pointers);
    });
  } else {
    launch_cooperative(op, saliency_kernel<A, kElement, NoPointers>, work, stream, work, out,
                       NoPointers{});
  }
}

template <class A>
void score(const char* op, const Bound& bound, const Criterion& criterion, const Output& out,
           const std::vector<void*>& others, bool squares_known, cudaStream_t stream) {
  switch (criterion.element) {
    case Element::kSquare:
      if (squares_known) {
        const int items = std::max({1, bound.plan.slices, bound.plan.groups});
        const int blocks =
            std::min((items - 1) / kThreads + 1, resident_blocks(op, finish_kernel<A>, kThreads));
        return launch(op, finish_kernel<A>, blocks, kThreads, false, stream, make_work(bound, nullptr),
                      out);
      }
      return run<A, Element::kSquare>(op, bound, out, others, stream);
    case Element::kAbsolute:
      return run<A, Element::kAbsolute>(op, bound, out, others, stream);
    case Element::kLargest:
      return run<A, Element::kLargest>(op, bound, out, others, stream);
    case Element::kProduct:
      return run<A, Element::kProduct>(op, bound, out, others, stream);
    case Element::kSquaredProduct:
      return run<A, Element::kSquaredProduct>(op, bound, out, others, stream);
    case Element::kWeighted:
      return run<A, Element::kWeighted>(op, bound, out, others, stream);
  }
}

void group_saliency(const Tensor& ticket, const Tensor& scores, const Tensor& slices,
                    const std::vector<Tensor>& others, const std::string& name, bool squares_known) {
  constexpr const char* kOp = "group_saliency";
  const LockedBound bound(kOp, ticket);
  const auto& [criterion, pointers] = check_saliency(kOp, *bound, scores, slices, others, name);
  const OnDevice here(kOp, bound->tables);
  const Output out{scores.mutable_data_ptr(), slices.mutable_data_ptr(), criterion.finish};
  if (bound->any_double) {
    score<double>(kOp, *bound, criterion, out, pointers, squares_known, here.stream());
  } else {
    score<float>(kOp, *bound, criterion, out, pointers, squares_known, here.stream());
  }
  record_use(kOp, *bound, here.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("group_saliency", TORCH_BOX(&group_saliency));
}

}  // namespace ocsfast::cuda
