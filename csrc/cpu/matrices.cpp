#include "matrices.h"

#include <cstring>

namespace ocsfast::cpu {
namespace {

// Gaps of up to two cache lines of floats are not worth leaving out: the prefetcher loads them anyway.
constexpr int64_t kLeastGap = 32;

}  // namespace

std::vector<Task> list_tasks(const std::vector<Matrix>& matrices) {
  std::vector<Task> tasks;
  for (size_t t = 0; t < matrices.size(); ++t) {
    const Matrix& m = matrices[t];
    for (int32_t k = 0; k < m.tasks; ++k) {
      const int32_t first = k * m.rows_per_task;
      tasks.push_back({static_cast<int32_t>(t), first, std::min(first + m.rows_per_task, m.rows)});
    }
  }
  return tasks;
}

Pruned find_pruned(const Plan& plan, const std::vector<Matrix>& matrices, const bool* mask) {
  const auto flags = [&](const int32_t* slice_of, int32_t n) {
    std::vector<uint8_t> flag(n);
    for (int32_t i = 0; i < n; ++i) {
      const int32_t slice = slice_of[i];
      flag[i] = slice >= 0 && mask[plan.slice_group[slice]];
    }
    return flag;
  };
  const auto any = [](const std::vector<uint8_t>& flag, int32_t base, int32_t n) {
    return base >= 0 && n > 0 && std::memchr(flag.data() + base, 1, n);
  };
  Pruned pruned{flags(plan.row_slice, plan.num_rows), flags(plan.col_slice, plan.num_cols), {}, {}};
  for (const Matrix& m : matrices) {
    pruned.any_row.push_back(any(pruned.row, m.row_base, m.rows));
    pruned.any_col.push_back(any(pruned.col, m.col_base, m.cols));
  }
  return pruned;
}

std::vector<Span> pruned_spans(const Matrix& m, const Pruned& pruned) {
  std::vector<Span> spans;
  for (int64_t c = 0; m.col_base >= 0 && c < m.cols; ++c) {
    if (!pruned.col[m.col_base + c]) continue;
    if (spans.empty() || c * m.run - spans.back().last > kLeastGap) spans.push_back({c * m.run, 0});
    spans.back().last = (c + 1) * m.run;
  }
  return spans;
}

}  // namespace ocsfast::cpu
