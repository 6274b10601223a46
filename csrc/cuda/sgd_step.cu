#include "launch.cuh"
#include "score.cuh"

namespace ocsfast::cuda {
namespace {

constexpr int kWordBits = 32;

// Read where they are used, from the kernel's argument: registers are short.
template <class C>
struct Rates {
  C momentum, gain, weight_decay, sign;  // gain: 1 - dampening; sign: -1 to maximize
};

struct Settings {
  Beside grads, momenta;
  uint32_t first[kMaxTensors / kWordBits + 1];  // bits: of the launch's tensors, whose momentum begins
  const double* lr;
  const float* strength;
  const float* factor;
  Rates<float> single;
  Rates<double> wide;
  bool nesterov, known;

  __device__ const Rates<float>& rates(float) const { return single; }
  __device__ const Rates<double>& rates(double) const { return wide; }
};
static_assert(sizeof(Work) + sizeof(Settings) <= 32764);

// A step of SGD, Eq. 8 before and Eq. 9 after it.
struct Sgd {
  using Join = Add;
  static constexpr int kStreams = 3, kUnroll = 1;
  static constexpr uint32_t kWrites = 1 | 4;
  static constexpr bool kPenalized = true, kSparse = false, kSums = true;

  const Settings& settings;

  template <class T>
  struct Step {
    T* stream[kStreams];  // weight, gradient, momentum
    accumulator_t<T> lr, once;
    bool begins;  // the momentum
    const Settings& settings;

    template <class C>
    __device__ C change(T (&element)[kStreams], Label<C> row, Label<C> col) const {
      const Rates<C>& rates = settings.rates(C(0));
      C now = to_number(element[0]);
      if (stream[1]) {
        const C slope = rates.weight_decay + row.slope + col.slope;
        C change = to_number(element[1]) * rates.sign;
        if (slope != C(0)) change += now * slope;
        if (stream[2]) {
          const C moved = begins ? change : to_number(element[2]) * rates.momentum + change * rates.gain;
          element[2] = from_number<T>(moved);
          const C stored = to_number(element[2]);
          change = settings.nesterov ? change + stored * rates.momentum : stored;
        }
        now -= change * lr;
      }
      if (row.counts || col.counts) now *= row.counts && col.counts ? once * once : once;
      element[0] = from_number<T>(now);
      const C stored = to_number(element[0]);
      return stored * stored;
    }
  };

  template <class A>
  __device__ Label<A> label(const Work& work, int32_t slice) const {
    const bool pruned = is_pruned(work, slice);
    return {pruned, pruned ? slope_of(work, slice, A(*settings.strength)) : A(0)};
  }
  __device__ bool walks(const Work& work, int32_t tensor) const {
    return (work.mask && has_slices(work.matrices[tensor])) || settings.grads(work, tensor);
  }
  template <class T>
  __device__ Step<T> start(const Work& work, int32_t tensor) const {
    using C = accumulator_t<T>;
    const int32_t own = tensor - work.first_tensor;
    return {{weight_of<T>(work, tensor), static_cast<T*>(settings.grads(work, tensor)),
             static_cast<T*>(settings.momenta(work, tensor))},
            static_cast<C>(*settings.lr),
            static_cast<C>(*settings.factor),
            static_cast<bool>(settings.first[own / kWordBits] >> own % kWordBits & 1),
            settings};
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<A>)
    sgd_kernel(const __grid_constant__ Work work, const __grid_constant__ Settings settings) {
  __shared__ Shared<A> shared;
  const auto grid = cooperative_groups::this_grid();
  if (work.mask && !settings.known) take_squares<A>(work, shared);
  walk<A>(work, Sgd{settings}, shared);
  if (!work.mask) return;
  grid.sync();  // the squares of the step before have been read
  gather_slices<Add, A>(
      work, false, [](int32_t) { return true; }, static_cast<A*>(work.slice_sq),
      static_cast<A*>(nullptr));
}

void sgd_step(const Tensor& ticket, const std::vector<Tensor>& grads, const std::vector<Tensor>& momenta,
              const std::vector<int64_t>& first, const Tensor& lr, double momentum, double dampening,
              double weight_decay, bool nesterov, bool maximize, const std::optional<Tensor>& mask,
              const Tensor& strength, const Tensor& factor, bool known) {
  constexpr const char* kOp = "sgd_step_";
  const Use bound(kOp, ticket);
  const SgdArguments a =
      check_sgd(kOp, *bound, grads, momenta, first, lr, momentum, mask, strength, factor);
  const torch::stable::accelerator::DeviceGuard guard(bound->tables.get_device_index());
  const cudaStream_t stream = current_stream(kOp, bound->tables);
  Work work = make_work(*bound, mask ? mask->const_data_ptr<bool>() : nullptr);
  Settings settings{};
  settings.lr = lr.const_data_ptr<double>();
  settings.strength = strength.const_data_ptr<float>();
  settings.factor = factor.const_data_ptr<float>();
  settings.wide = {momentum, 1 - dampening, weight_decay, maximize ? -1.0 : 1.0};
  settings.single = {static_cast<float>(momentum), static_cast<float>(1 - dampening),
                     static_cast<float>(weight_decay), maximize ? -1.0f : 1.0f};
  settings.nesterov = nesterov;
  settings.known = known;
  for_each_window(work, *bound, [&] {
    copy_pointers(work, a.grads, settings.grads);
    copy_pointers(work, a.momenta, settings.momenta);
    std::fill(std::begin(settings.first), std::end(settings.first), 0u);
    for (int32_t t = 0; t < work.tensors; ++t) {
      if (a.first[work.first_tensor + t]) settings.first[t / kWordBits] |= 1u << t % kWordBits;
    }
    launch_cooperative(kOp, bound->wide ? sgd_kernel<double> : sgd_kernel<float>, work, stream, work,
                       settings);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocsfast, CUDA, m) {
  m.impl("sgd_step_", TORCH_BOX(&sgd_step));
}

}  // namespace ocsfast::cuda
