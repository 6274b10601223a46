#include "sums.h"

namespace ocsfast::cpu {

Sums::Sums(const Bound& bound, double* slices, bool touched_only, bool largest)
    : bound_(bound),
      touched_only_(touched_only),
      largest_(largest),
      row_sums_(bound.row_sums.mutable_data_ptr<double>()),
      partials_(bound.partials.mutable_data_ptr<double>()),
      slices_(slices),
      left_(new std::atomic<int32_t>[bound.matrices.size()]),
      with_cols_(new std::atomic<bool>[bound.matrices.size()]) {
  for (size_t t = 0; t < bound.matrices.size(); ++t) {
    left_[t].store(bound.matrices[t].tasks, std::memory_order_relaxed);
    with_cols_[t].store(false, std::memory_order_relaxed);
  }
  if (!touched_only) std::fill_n(slices, bound.plan.slices, 0.0);
}

void Sums::finish(int32_t tensor) {
  if (left_[tensor].fetch_sub(1, std::memory_order_acq_rel) == 1) sum_slices(tensor);
}

void Sums::sum_slices(int32_t tensor) const {
  const Matrix& m = bound_.matrices[tensor];
  const Plan& plan = bound_.plan;
  const auto gather = [&](const int32_t* slice_of, int32_t extent, const double* sums) {
    if (touched_only_) {  // otherwise all slices were set to 0 at the beginning
      for (int32_t i = 0; i < extent; ++i) {
        if (slice_of[i] >= 0) slices_[slice_of[i]] = 0;
      }
    }
    for (int32_t i = 0; i < extent; ++i) {
      const int32_t slice = slice_of[i];
      if (slice >= 0) slices_[slice] = combine(slices_[slice], sums[i]);
    }
  };
  if (m.row_base >= 0) gather(plan.row_slice + m.row_base, m.rows, row_sums_ + m.row_base);
  if (!with_cols_[tensor].load(std::memory_order_relaxed)) return;
  double* sums = partials_ + m.first_partial;  // the first task's, to which the others' are added
  for (int32_t k = 1; k < m.tasks; ++k) {
    const double* partial = sums + static_cast<int64_t>(k) * m.cols;
    if (largest_) {
      for (int32_t c = 0; c < m.cols; ++c) sums[c] = combine(sums[c], partial[c]);
    } else {
#pragma omp simd
      for (int32_t c = 0; c < m.cols; ++c) sums[c] += partial[c];
    }
  }
  gather(plan.col_slice + m.col_base, m.cols, sums);
}

void sum_elements(const Bound& bound, const Criterion& criterion, const std::vector<void*>& others,
                  double* slices) {
  Sums sums(bound, slices, false, criterion.element == Element::kLargest);
  for_each_task(bound, [&](const Task& task, ThreadMemory& memory) {
    const Matrix& m = bound.matrices[task.tensor];
    if (!has_slices(m)) return;
    if (criterion.needs_other && !others[task.tensor]) return;
    dispatch(m.dtype, [&](auto type) {
      using T = decltype(type);
      Bands<T> bands = make_bands<T>(bound, task, {}, memory);
      bands.other = bands.w;
      if (criterion.needs_other) {
        bands.other = static_cast<const T*>(others[task.tensor]) + (bands.w - static_cast<T*>(m.weight));
      }
      sums.run(task, bands, memory,
               [&](const Bands<T>& b) { row_kernels<T>().score(b, criterion.element); });
    });
  });
}

double* compute_squares(const Bound& bound) {
  auto* slices = bound.slice_sq.mutable_data_ptr<double>();
  sum_elements(bound, kL2, {}, slices);
  return slices;
}

}  // namespace ocsfast::cpu
