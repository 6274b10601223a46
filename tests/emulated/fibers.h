// Threads of CUDA as fibers. Part of emulator.cpp; cuda_runtime.h beside this file says what is
// promised.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <random>
#include <vector>

#include "cuda_runtime.h"

namespace emulated {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

[[noreturn]] inline void stop(const char* what, Place first, Place other) {
  fprintf(stderr, "emulated CUDA: block %u, thread %u: %s: %s:%d", blockIdx.x, threadIdx.x, what,
          first.file, first.line);
  if (other.line) fprintf(stderr, " and %s:%d", other.file, other.line);
  fputc('\n', stderr);
  std::abort();
}

// Where all blocks of a launch wait for each other.
class Grid {
 public:
  explicit Grid(unsigned blocks) : blocks_(blocks) {}

  void wait(Place place) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (left_) stop("the grid waits for a block that has left", place, {});
    if (arrived_ && (place.line != place_.line || strcmp(place.file, place_.file) != 0)) {
      stop("blocks wait for the grid in different places", place_, place);
    }
    place_ = place;
    const unsigned round = round_;
    if (++arrived_ == blocks_) {
      arrived_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round_ != round; });
    }
  }
  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (arrived_) stop("a block leaves, others wait for the grid", place_, {});
    left_ = true;
  }

 private:
  const unsigned blocks_;
  std::mutex mutex_;
  std::condition_variable all_;
  unsigned arrived_ = 0, round_ = 0;
  bool left_ = false;
  Place place_{};
};

// Threads that wait for each other: of a block, or of a warp.
struct Meeting {
  unsigned arrived = 0, round = 0;
  Place place{};
  std::vector<unsigned> waiting;
};

// Stacks of fibers that have ended, to be used again.
class Stacks {
 public:
  void* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) {
      void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) std::abort();
      return stack;
    }
    void* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give(void* stack) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(stack);
  }

 private:
  std::mutex mutex_;
  std::vector<void*> free_;
};

inline Stacks& stacks() {
  static auto* const instance = new Stacks;
  return *instance;
}

class Block;
inline thread_local Block* current = nullptr;

// A block: runs its threads as fibers, one at a time, in a random order.
class Block {
 public:
  Block(Grid& grid, unsigned threads, uint32_t seed, const std::function<void()>& kernel)
      : grid_(grid), kernel_(kernel), random_(seed), fibers_(threads), warps_(threads / kWarp) {
    if (threads % kWarp != 0) std::abort();
  }

  void run() {
    for (unsigned t = 0; t < fibers_.size(); ++t) {
      Fiber& fiber = fibers_[t];
      fiber.stack = stacks().take();
      getcontext(&fiber.begin);
      fiber.begin.uc_stack = {fiber.stack, 0, kStackBytes};
      fiber.begin.uc_link = nullptr;
      makecontext(&fiber.begin, &Block::enter, 0);
      ready_.push_back(t);
    }
    unsigned left = 0;
    while (left < fibers_.size()) {
      if (ready_.empty()) stop("threads wait for others that have left or wait elsewhere", stuck(), {});
      std::swap(ready_[random_() % ready_.size()], ready_.back());
      self_ = ready_.back();
      ready_.pop_back();
      threadIdx = {self_, 0, 0};
      resume(fibers_[self_]);
      left += fibers_[self_].done;
    }
    for (Fiber& fiber : fibers_) stacks().give(fiber.stack);
    grid_.leave();
  }

  void barrier(Place place) { barrier_or(false, place); }

  bool barrier_or(bool value, Place place) {
    bool& either = either_[all_.round % 2];
    either |= value;
    meet(all_, fibers_.size(), place, [&] { either_[1 - all_.round % 2] = false; });
    return either;
  }

  void grid_barrier(Place place) {
    meet(all_, fibers_.size(), place, [&] {
      either_[1 - all_.round % 2] = false;
      grid_.wait(place);
    });
  }

  const uint64_t* exchange(uint32_t mask, uint64_t value, Place place) {
    if (mask != ~0u) stop("an operation of a warp without all of its lanes", place, {});
    Warp& warp = warps_[self_ / kWarp];
    uint64_t* values = warp.values[warp.meeting.round % 2];
    values[self_ % kWarp] = value;
    meet(warp.meeting, kWarp, place, nullptr);
    return values;
  }

 private:
  struct Fiber {
    void* stack = nullptr;
    ucontext_t begin;
    jmp_buf state;
    bool begun = false, done = false;
  };
  struct Warp {
    Meeting meeting;
    uint64_t values[2][kWarp];  // of two rounds: the last one's are read until the next one is complete
  };

  static void enter() {
    Block& block = *current;
    block.kernel_();
    block.fibers_[block.self_].done = true;
    _longjmp(block.home_, 1);
  }

  // Switches fibers by setjmp and longjmp: swapcontext would make a system call for the signal mask
  // every time.
  __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(home_) != 0) return;
    if (fiber.begun) _longjmp(fiber.state, 1);
    fiber.begun = true;
    setcontext(&fiber.begin);
  }
  __attribute__((noinline)) void pause() {
    if (_setjmp(fibers_[self_].state) == 0) _longjmp(home_, 1);
  }

  // Waits for the others; `last` runs in the thread that comes last.
  void meet(Meeting& meeting, size_t all, Place place, const std::function<void()>& last) {
    if (meeting.arrived == 0) meeting.place = place;
    if (place.line != meeting.place.line || strcmp(place.file, meeting.place.file) != 0) {
      stop("threads that wait for each other came from", meeting.place, place);
    }
    if (++meeting.arrived < all) {
      meeting.waiting.push_back(self_);
      return pause();
    }
    if (last) last();
    meeting.arrived = 0;
    ++meeting.round;
    ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }

  // Where a thread waits, if all do.
  Place stuck() const {
    if (all_.arrived) return all_.place;
    for (const Warp& warp : warps_) {
      if (warp.meeting.arrived) return warp.meeting.place;
    }
    return {"nowhere", 0};
  }

  Grid& grid_;
  const std::function<void()>& kernel_;
  std::minstd_rand random_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned> ready_;
  Meeting all_;
  bool either_[2] = {};  // of two rounds too
  unsigned self_ = 0;
  jmp_buf home_;
};

}  // namespace emulated
