// One parallel region over a list of tasks of unequal length.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace ocsfast::cpu {

// Memory a thread reuses from task to task; it starts at a cache line, or each vector would touch two.
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

// Calls task(i, state) for every i < n, with a State for each thread. Threads take the next task when
// they are done with one: which thread runs a task must not matter to its result.
template <class State, class Task>
void for_each(int64_t n, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    State state;
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) task(i, state);
  });
}

}  // namespace ocsfast::cpu
