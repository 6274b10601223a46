#include "launch.cuh"
#include "score.cuh"

namespace ocsfast::cuda {
namespace {

struct Output {
  void* scores;  // [groups] accumulators; null: only the slices' sums are wanted
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

// The mean over each group's slices of what their sums come to.
template <class A>
__device__ void score_groups(const Plan& plan, const Output& out, const A* slices) {
  const auto count = [&](int32_t group) {
    return plan.group_start[group + 1] - plan.group_start[group];
  };
  const auto part = [&](int32_t group, int32_t first, int32_t stride) {
    A sum = 0;
    for (int32_t k = plan.group_start[group] + first; k < plan.group_start[group + 1]; k += stride) {
      const int32_t slice = plan.group_slice[k];
      sum += finish(out.finish, slices[slice], plan.slice_size[slice]);
    }
    return sum;
  };
  add_up_each<Sum>(plan.groups, count, part, [&](int32_t group, A sum) {
    static_cast<A*>(out.scores)[group] = sum / static_cast<A>(max(1, count(group)));
  });
}

template <class T, class A, Element kElement, class Others>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<Score<kElement>, T, A>)
    saliency_kernel(const __grid_constant__ Work work, const __grid_constant__ Output out,
                    const __grid_constant__ Others others) {
  __shared__ Shared<Score<kElement>, T, A> shared;
  const auto grid = cooperative_groups::this_grid();
  Score<kElement> score{};
  if constexpr (needs_other(kElement)) score.others = &others;
  walk(work, score, shared);
  if (!work.gathers) return;
  grid.sync();
  A* slices = static_cast<A*>(out.slices);
  A* squares = kElement == Element::kSquare ? static_cast<A*>(work.slice_sq) : nullptr;
  gather_slices<typename Score<kElement>::Reduce, A>(
      work, false, [&](int32_t tensor) { return score.has_operands(work, tensor); }, slices, squares);
  if (!work.last_launch || !out.scores) return;
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

template <Element kElement>
void run(const char* op, const Bound& bound, const Output& out, const std::vector<void*>& others,
         cudaStream_t stream) {
  using Others = std::conditional_t<needs_other(kElement), PointerTable<>, NoPointers>;
  Work work = make_work(bound, nullptr);
  Others pointers;
  const size_t most = needs_other(kElement) ? kMaxTensors : bound.matrices.size();
  for_each_launch(work, bound, most, [&](auto types) {
    using Type = decltype(types);
    if constexpr (needs_other(kElement)) copy_pointers(work, others, pointers);
    launch_cooperative(op, saliency_kernel<typename Type::T, typename Type::A, kElement, Others>, work,
                       stream, work, out, pointers);
  });
}

template <class A>
void finish_squares(const char* op, const Bound& bound, const Output& out, cudaStream_t stream) {
  const int items = std::max({1, bound.plan.slices, bound.plan.groups});
  const int blocks =
      std::min((items - 1) / kThreads + 1, resident_blocks(op, finish_kernel<A>, kThreads));
  launch(op, finish_kernel<A>, blocks, kThreads, false, stream, make_work(bound, nullptr), out);
}

void score(const char* op, const Bound& bound, const Criterion& criterion, const Output& out,
           const std::vector<void*>& others, bool squares_known, cudaStream_t stream) {
  switch (criterion.element) {
    case Element::kSquare:
      if (!squares_known) return run<Element::kSquare>(op, bound, out, others, stream);
      return bound.any_double ? finish_squares<double>(op, bound, out, stream)
                              : finish_squares<float>(op, bound, out, stream);
    case Element::kAbsolute:
      return run<Element::kAbsolute>(op, bound, out, others, stream);
    case Element::kLargest:
      return run<Element::kLargest>(op, bound, out, others, stream);
    case Element::kProduct:
      return run<Element::kProduct>(op, bound, out, others, stream);
    case Element::kSquaredProduct:
      return run<Element::kSquaredProduct>(op, bound, out, others, stream);
    case Element::kWeighted:
      return run<Element::kWeighted>(op, bound, out, others, stream);
  }
}

void group_saliency(const Tensor& ticket, const Tensor& scores, const Tensor& slices,
                    const std::vector<Tensor>& others, const std::string& name, bool squares_known) {
  constexpr const char* kOp = "group_saliency";
  const LockedBound bound(kOp, ticket);
  const auto& [criterion, pointers] = check_saliency(kOp, *bound, scores, slices, others, name);
  const OnDevice here(kOp, bound->tables);
  const Output out{scores.mutable_data_ptr(), slices.mutable_data_ptr(), criterion.finish};
  score(kOp, *bound, criterion, out, pointers, squares_known, here.stream());
  record_use(kOp, *bound, here.stream());
}

}  // namespace

void launch_squares(const char* op, const Bound& bound, cudaStream_t stream) {
  run<Element::kSquare>(op, bound, Output{nullptr, bound.slice_sq.mutable_data_ptr(), Finish::kHalf}, {},
                        stream);
}

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("group_saliency", TORCH_BOX(&group_saliency));
}

}  // namespace ocsfast::cuda
