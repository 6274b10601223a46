// Sums of squares of rows and columns in one read of the weights, then of slices.
//
// A task (rows of one tensor) writes its rows' sums and one partial sum a column; whoever finishes a
// tensor last adds them up, in a fixed order. The result does not depend on the number of threads.
#include <atomic>
#include <cstring>
#include <memory>
#include <type_traits>

#include "matrices.h"
#include "parallel.h"

namespace ocsfast::cpu {
namespace {

// A fixed number of lanes, whatever the machine's vectors hold, so that sums are the same on each.
constexpr int kVectorBytes = 64;
// Elements a lane adds up before the sum goes on in double: 64 additions lose less than rounding the
// result to float does.
constexpr int64_t kVectorsPerFold = 64;
// The same for a column, in bands.
constexpr int64_t kBandsPerFold = 128;
// Bands read side by side: a column's sum is loaded and stored once for four elements.
constexpr int kBandsAtOnce = 4;

template <class A>
struct Lanes {
  static constexpr int64_t count = kVectorBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kVectorBytes)));
};

template <class A, class T>
inline typename Lanes<A>::type load(const T* p) {
  typename Lanes<A>::type v;
  if constexpr (std::is_same_v<A, T>) {
    std::memcpy(&v, p, sizeof(v));
  } else {
    A lanes[Lanes<A>::count];
#pragma omp simd
    for (int64_t i = 0; i < Lanes<A>::count; ++i) lanes[i] = static_cast<A>(p[i]);
    std::memcpy(&v, lanes, sizeof(v));
  }
  return v;
}

template <class A>
inline double fold(const typename Lanes<A>::type& v) {
  A lanes[Lanes<A>::count];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t half = Lanes<A>::count / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Squares of neighbouring bands: each band's sum to sums[band], each column's onto cols.
template <int kBands, bool kWithCols, class T, class A>
inline void square_bands(const T* __restrict w, int64_t width, double* __restrict sums,
                         A* __restrict cols) {
  using V = typename Lanes<A>::type;
  constexpr int64_t kLanes = Lanes<A>::count;
  double total[kBands] = {};
  int64_t j = 0;
  while (j + kLanes <= width) {
    const int64_t end = std::min(j + kVectorsPerFold * kLanes, width - kLanes + 1);
    V sum[kBands] = {};
    for (; j < end; j += kLanes) {
      V over_bands = {};
      for (int b = 0; b < kBands; ++b) {
        const V v = load<A>(w + b * width + j);
        const V square = v * v;
        sum[b] += square;
        over_bands += square;
      }
      if constexpr (kWithCols) {
        V col;
        std::memcpy(&col, cols + j, sizeof(V));
        col += over_bands;
        std::memcpy(cols + j, &col, sizeof(V));
      }
    }
    for (int b = 0; b < kBands; ++b) total[b] += fold<A>(sum[b]);
  }
  for (; j < width; ++j) {
    A over_bands = 0;
    for (int b = 0; b < kBands; ++b) {
      const A v = static_cast<A>(w[b * width + j]);
      const A square = v * v;
      total[b] += square;
      over_bands += square;
    }
    if constexpr (kWithCols) cols[j] += over_bands;
  }
  for (int b = 0; b < kBands; ++b) sums[b] = total[b];
}

template <bool kWithCols, class T, class A>
inline void square_all_bands(const T* w, int64_t bands, int64_t width, double* sums, A* cols) {
  int64_t b = 0;
  for (; b + kBandsAtOnce <= bands; b += kBandsAtOnce) {
    square_bands<kBandsAtOnce, kWithCols>(w + b * width, width, sums + b, cols);
  }
  for (; b < bands; ++b) square_bands<1, kWithCols>(w + b * width, width, sums + b, cols);
}

// w: [bands, m.width]; sums: [bands] out.
template <class T>
void band_sums(const Matrix& m, const T* w, int64_t bands, double* sums) {
  using A = accumulator_t<T>;
  square_all_bands<false, T, A>(w, bands, m.width, sums, nullptr);
}

// The same, and partial: [m.cols] out.
template <class T>
void band_and_col_sums(const Matrix& m, const T* w, int64_t bands, double* sums, double* partial,
                       Scratch& scratch) {
  using A = accumulator_t<T>;
  const int64_t width = m.width;
  double* total = scratch.get<double>(2 * width);
  A* cols = reinterpret_cast<A*>(total + width);
  std::fill_n(total, width, 0.0);
  for (int64_t first = 0; first < bands; first += kBandsPerFold) {
    const int64_t count = std::min(kBandsPerFold, bands - first);
    std::fill_n(cols, width, A(0));
    square_all_bands<true, T, A>(w + first * width, count, width, sums + first, cols);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) total[j] += cols[j];
  }
  for (int64_t c = 0; c < m.cols; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < m.run; ++i) sum += total[c * m.run + i];
    partial[c] = sum;
  }
}

class SliceSquares {
 public:
  SliceSquares(const Plan& plan, const std::vector<Matrix>& matrices, const Pruned* pruned)
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

  std::vector<double> run(const std::vector<Task>& tasks) {
    for_each_task(tasks.size(), [&](int64_t i, Scratch& scratch) {
      const int32_t t = tasks[i].tensor;
      if (pruned_ && !pruned_->touches(t)) return;
      dispatch(matrices_[t].dtype, [&](auto type) { square_task<decltype(type)>(tasks[i], scratch); });
      if (left_[t].fetch_sub(1, std::memory_order_acq_rel) == 1) sum_slices(t, scratch);
    });
    return std::move(slice_sq_);
  }

 private:
  bool needs_cols(int32_t t) const {
    return matrices_[t].col_base >= 0 && (!pruned_ || pruned_->any_col[t]);
  }

  // Rows that are summed although no column is needed.
  bool needs_row(const Matrix& m, int32_t row) const {
    return m.row_base >= 0 && (!pruned_ || pruned_->row[m.row_base + row]);
  }

  template <class T>
  void square_task(const Task& task, Scratch& scratch) {
    const Matrix& m = matrices_[task.tensor];
    const int64_t row_elements = static_cast<int64_t>(m.bands) * m.width;
    const T* w = static_cast<const T*>(m.weight) + task.first_row * row_elements;
    const int32_t rows = task.last_row - task.first_row;
    std::vector<double> sums(static_cast<size_t>(rows) * m.bands);
    if (needs_cols(task.tensor)) {
      double* partial =
          &partial_[m.first_partial + static_cast<int64_t>(task.first_row / m.rows_per_task) * m.cols];
      band_and_col_sums(m, w, static_cast<int64_t>(rows) * m.bands, sums.data(), partial, scratch);
    } else if (!pruned_) {
      band_sums(m, w, static_cast<int64_t>(rows) * m.bands, sums.data());
    } else {
      for (int32_t r = 0; r < rows; ++r) {
        if (needs_row(m, task.first_row + r))
          band_sums(m, w + r * row_elements, m.bands, &sums[r * m.bands]);
      }
    }
    if (m.row_base < 0) return;
    for (int32_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int32_t b = 0; b < m.bands; ++b) sum += sums[r * m.bands + b];
      row_sq_[m.row_base + task.first_row + r] = sum;
    }
  }

  void sum_slices(int32_t t, Scratch& scratch) {
    const Matrix& m = matrices_[t];
    for (int32_t r = 0; r < m.rows && m.row_base >= 0; ++r) {
      const int32_t slice = plan_.row_slice[m.row_base + r];
      if (slice >= 0) slice_sq_[slice] += row_sq_[m.row_base + r];
    }
    if (!needs_cols(t)) return;
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

  const Plan& plan_;
  const std::vector<Matrix>& matrices_;
  const Pruned* pruned_;
  std::unique_ptr<double[]> row_sq_;
  std::unique_ptr<double[]> partial_;
  std::unique_ptr<std::atomic<int32_t>[]> left_;  // tasks of a tensor that are not done
  std::vector<double> slice_sq_;
};

}  // namespace

std::vector<double> slice_squares(const Plan& plan, const std::vector<Matrix>& matrices,
                                  const std::vector<Task>& tasks, const Pruned* pruned) {
  return SliceSquares(plan, matrices, pruned).run(tasks);
}

}  // namespace ocsfast::cpu
