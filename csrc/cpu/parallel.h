// One parallel region over a list of tasks of unequal length.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace ocsfast::cpu {

// Memory that a thread uses again for every task. It starts at a cache line: otherwise each vector would
// touch two.
class Scratch {
 public:
  template <class T>
  T* get(size_t n) {
    const size_t lines = (n * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
    if (lines > lines_.size()) lines_ = std::vector<Line>(lines);
    return reinterpret_cast<T*>(lines_.data());
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines_;
};

// Calls task(i, memory) for every i < n; each thread has a Memory of its own. A thread that is done with
// one task takes the next one, so the result must not depend on which thread runs a task.
template <class Memory, class Task>
void for_each(int64_t n, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Memory memory;
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) task(i, memory);
  });
}

}  // namespace ocsfast::cpu
