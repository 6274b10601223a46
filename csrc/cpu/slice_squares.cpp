#include "slice_squares.h"

#include <thread>

namespace ocsfast::cpu {
namespace {

// Bands a column's sum takes in before it goes on in double: 128 additions lose less than rounding the
// result to float does.
constexpr int64_t kBandsPerFold = 128;

constexpr int32_t kSummed = -1;

// w: [bands, m.width]; sums: [bands] out; partial: [m.cols] out.
template <class T>
void band_and_col_sums(const Matrix& m, const T* w, int64_t bands, double* sums, double* partial,
                       Scratch& scratch) {
  using A = accumulator_t<T>;
  const int64_t width = m.width, run = m.run;
  A* cols = scratch.get<A>(width);
  std::fill_n(partial, m.cols, 0.0);
  for (int64_t first = 0; first < bands; first += kBandsPerFold) {
    const int64_t count = std::min(kBandsPerFold, bands - first);
    std::fill_n(cols, width, A(0));
    row_kernels<T>().square(w + first * width, count, width, sums + first, cols);
    if (run == 1) {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) partial[c] += cols[c];
      continue;
    }
    for (int64_t c = 0; c < m.cols; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < run; ++i) sum += cols[c * run + i];
      partial[c] += sum;
    }
  }
}

}  // namespace

SliceSquares::SliceSquares(const Plan& plan, const std::vector<Matrix>& matrices, const Pruned* pruned)
    : plan_(plan),
      matrices_(matrices),
      pruned_(pruned),
      row_sq_(new double[plan.num_rows]),
      partial_(new double[count_partials(matrices)]),
      left_(new std::atomic<int32_t>[matrices.size()]),
      slice_sq_(plan.slices, 0.0) {
  for (size_t t = 0; t < matrices.size(); ++t)
    left_[t].store(matrices[t].tasks, std::memory_order_relaxed);
}

void SliceSquares::run(const Task& task, Scratch& scratch) {
  const int32_t t = task.tensor;
  dispatch(matrices_[t].dtype, [&](auto type) { square_task<decltype(type)>(task, scratch); });
  if (left_[t].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  sum_slices(t, scratch);
  left_[t].store(kSummed, std::memory_order_release);
}

void SliceSquares::wait_for(int32_t tensor) const {
  while (left_[tensor].load(std::memory_order_acquire) != kSummed) std::this_thread::yield();
}

bool SliceSquares::needs_cols(int32_t tensor) const {
  return matrices_[tensor].col_base >= 0 && (!pruned_ || pruned_->any_col[tensor]);
}

template <class T>
void SliceSquares::square_task(const Task& task, Scratch& scratch) {
  const Matrix& m = matrices_[task.tensor];
  const RowKernels<T>& kernels = row_kernels<T>();
  const int64_t row_elements = static_cast<int64_t>(m.bands) * m.width;
  const T* w = static_cast<const T*>(m.weight) + task.first_row * row_elements;
  const int32_t rows = task.last_row - task.first_row;
  const int64_t bands = static_cast<int64_t>(rows) * m.bands;
  std::vector<double> sums(bands);
  if (needs_cols(task.tensor)) {
    double* partial =
        &partial_[m.first_partial + static_cast<int64_t>(task.first_row / m.rows_per_task) * m.cols];
    band_and_col_sums(m, w, bands, sums.data(), partial, scratch);
  } else if (m.row_base < 0) {
    return;
  } else if (!pruned_) {
    kernels.square(w, bands, m.width, sums.data(), nullptr);
  } else {
    for (int32_t r = 0; r < rows; ++r) {
      if (pruned_->row[m.row_base + task.first_row + r])
        kernels.square(w + r * row_elements, m.bands, m.width, &sums[r * m.bands], nullptr);
    }
  }
  if (m.row_base < 0) return;
  for (int32_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int32_t b = 0; b < m.bands; ++b) sum += sums[r * m.bands + b];
    row_sq_[m.row_base + task.first_row + r] = sum;
  }
}

void SliceSquares::sum_slices(int32_t tensor, Scratch& scratch) {
  const Matrix& m = matrices_[tensor];
  for (int32_t r = 0; r < m.rows && m.row_base >= 0; ++r) {
    const int32_t slice = plan_.row_slice[m.row_base + r];
    if (slice >= 0) slice_sq_[slice] += row_sq_[m.row_base + r];
  }
  if (!needs_cols(tensor)) return;
  double* col_sq = scratch.get<double>(m.cols);
  std::fill_n(col_sq, m.cols, 0.0);
  for (int32_t k = 0; k < m.tasks; ++k) {
    const double* partial = &partial_[m.first_partial + static_cast<int64_t>(k) * m.cols];
#pragma omp simd
    for (int32_t c = 0; c < m.cols; ++c) col_sq[c] += partial[c];
  }
  for (int32_t c = 0; c < m.cols; ++c) {
    const int32_t slice = plan_.col_slice[m.col_base + c];
    if (slice >= 0) slice_sq_[slice] += col_sq[c];
  }
}

}  // namespace ocsfast::cpu
