// Tasks over torch's own threads, and scratch memory that each thread keeps.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

#include "cpu/run/memory.h"

namespace fastcl::cpu {

int64_t thread_count();

// Calls work() on that many threads, this one among them, and throws what one of them has thrown.
void on_threads(int64_t threads, const std::function<void()>& work);

// A thread's scratch: taken piece by piece within one task, kept for the next unless it is large.
class Scratch {
 public:
  template <class T>
  T* take(int slot, int64_t count) {
    Piece& piece = pieces_[slot];
    if (piece.bytes < count * sizeof(T)) {
      piece.memory.reset();
      piece.memory = allocate<char>(count * sizeof(T));
      piece.bytes = count * sizeof(T);
    }
    return reinterpret_cast<T*>(piece.memory.get());
  }
  void release_large() {
    for (Piece& piece : pieces_)
      if (piece.bytes > kKept) piece = {};
  }

 private:
  static constexpr size_t kKept = 1 << 20;
  struct Piece {
    Buffer<char> memory;
    size_t bytes = 0;
  };
  Piece pieces_[10];  // a task's slots
};

// Calls task(index, scratch) for every index, in any order, on all threads.
template <class Task>
void for_each_task(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    static thread_local Scratch scratch;
    for (int64_t index; (index = next.fetch_add(1)) < count;) task(index, scratch);
    scratch.release_large();
  };
  const int64_t threads = std::min(count, thread_count());
  if (threads <= 1)
    work();
  else
    on_threads(threads, work);
}

// Splits [0, count) into ranges of `grain` and calls body(begin, end, scratch) for each.
template <class Body>
void for_each_range(int64_t count, int64_t grain, const Body& body) {
  for_each_task((count + grain - 1) / grain, [&](int64_t index, Scratch& scratch) {
    body(index * grain, std::min(count, (index + 1) * grain), scratch);
  });
}

}  // namespace fastcl::cpu
