// How the grid of tiles is divided into tasks, and in which order they may add to what they share.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/run/parallel.h"
#include "cpu/simd/kernels.h"

namespace fastcl::cpu {

constexpr int64_t kMaxBlock = kMaxTile;  // lanes or rows of a tile; a multiple of kLaneUnit
static_assert(kMaxBlock % kLaneUnit == 0);

// The smallest block that leaves the number of blocks as if they were of `largest`.
inline int64_t even_block(int64_t count, int64_t largest) {
  const int64_t blocks = std::max<int64_t>(ceil_div(count, largest), 1);
  return std::max(round_up(ceil_div(count, blocks), kLaneUnit), kLaneUnit);
}

// One side's blocks, in groups of neighbours.
struct Groups {
  int64_t count = 0;  // of rows
  int64_t block = 0;
  int64_t blocks = 0;
  int64_t groups = 0;
  int64_t copies = 1;  // of the sums of this side, where it has too few groups to keep many threads busy

  int64_t first_block(int64_t group) const { return group * blocks / groups; }
  int64_t begin(int64_t group) const { return std::min(count, first_block(group) * block); }
  int64_t end(int64_t group) const { return begin(group + 1); }
};

// A task is a group of queries by a group of keys. It adds to the sums of both, so the tasks of a group
// take turns, in the order of the list: no float is added by two threads at once, and the order of every
// sum depends on the shapes only. Neighbours in the list share few groups, so that they run side by side.
struct Plan {
  struct Task {
    int64_t query_group, key_group;
    int64_t query_copy, key_copy;
    int64_t query_turn, key_turn;
    bool on_diagonal;  // of a symmetric problem: both groups are one
  };
  Groups query, key;
  bool symmetric = false;
  std::vector<Task> tasks;
};

// In how many parts a pass over the keys by blocks of queries is divided; each has its own sums of all
// queries.
int64_t parts_of_keys(int64_t queries, int64_t keys);

Plan make_plan(int64_t queries, int64_t keys, bool symmetric);

// Who may go next, for each of several things that tasks share. A task may wait for tasks of lower index
// only: those are under way, whatever the number of threads.
class Turns {
 public:
  explicit Turns(int64_t things) : next_(things) {}

  // Calls body() when `turn` has come for a thing, or not at all if a task has failed.
  template <class Body>
  void take(int64_t thing, int64_t turn, const Body& body) {
    for (int64_t spins = 0; next_[thing].load(std::memory_order_acquire) != turn; spins++) {
      if (failed_) return;
      if (spins > kSpins) std::this_thread::yield();
    }
    body();
    next_[thing].store(turn + 1, std::memory_order_release);
  }

  // The task, with what else must know that it has failed.
  template <class Task>
  auto guarded(const Task& task) {
    return [this, task](int64_t index, Scratch& scratch) {
      try {
        task(index, scratch);
      } catch (...) {
        failed_ = true;
        throw;
      }
    };
  }

 private:
  static constexpr int64_t kSpins = 1000;
  std::vector<std::atomic<int64_t>> next_;
  std::atomic<bool> failed_{false};
};

// Calls body(task, scratch) for the tasks of a plan, each in its turns.
template <class Body>
void for_each_task(const Plan& plan, const Body& body) {
  const int64_t query_things = plan.query.groups * plan.query.copies;
  const int64_t first_key_thing = plan.symmetric ? 0 : query_things;
  Turns turns(query_things + plan.key.groups * plan.key.copies);
  for_each_task(plan.tasks.size(), turns.guarded([&](int64_t index, Scratch& scratch) {
    const Plan::Task& task = plan.tasks[index];
    const int64_t query = task.query_group * plan.query.copies + task.query_copy;
    const int64_t key = first_key_thing + task.key_group * plan.key.copies + task.key_copy;
    turns.take(query, task.query_turn, [&] {
      if (task.on_diagonal) return body(task, scratch);
      turns.take(key, task.key_turn, [&] { body(task, scratch); });
    });
  }));
}

}  // namespace fastcl::cpu
