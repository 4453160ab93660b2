// Tasks that take turns on threads of their own, as a program for the thread and address sanitizers, which a
// whole torch does not survive.
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "cpu/run/plan.h"
#include "cpu/test/harness.h"

namespace fastcl::cpu {

namespace {

constexpr int64_t kNobody = -1;

// What the tasks add to, in sums that show their order; the task `failing` throws.
struct Sums {
  std::vector<double> query, key;

  Sums(const Plan& plan, int64_t failing)
      : query(plan.query.groups * plan.query.copies), key(plan.key.groups * plan.key.copies) {
    std::vector<double>& keys = plan.symmetric ? query : key;
    for_each_task(plan, [&](const Plan::Task& task, Scratch& scratch) {
      const int64_t index = &task - plan.tasks.data();
      if (index == failing) throw std::runtime_error("a task failed");
      double* term = scratch.take<double>(0, 1);
      *term = index + 1;
      double& q = query[task.query_group * plan.query.copies + task.query_copy];
      double& k = keys[task.key_group * plan.key.copies + task.key_copy];
      q = 0.75 * q + *term;
      if (!task.on_diagonal) k = 0.5 * k + *term;
    });
  }
};

int check_plan(int64_t queries, int64_t keys, bool symmetric) {
  int failures = 0;
  const Plan plan = make_plan(queries, keys, symmetric);
  threads_of_the_test = 1;
  const Sums exact(plan, kNobody);
  for (const int64_t threads : {2, 3, 8}) {
    threads_of_the_test = threads;
    for (int repeat = 0; repeat < 3; repeat++) {
      const Sums got(plan, kNobody);
      if (got.query == exact.query && got.key == exact.key) continue;
      std::printf("%ld x %ld, symmetric %d: %ld threads add in another order\n", long(queries), long(keys),
                  symmetric, long(threads));
      failures++;
    }
    const int64_t count = plan.tasks.size();
    for (const int64_t failing : {int64_t{0}, count / 2, count - 1}) {
      try {
        Sums(plan, failing);
        std::printf("%ld x %ld: the failure of task %ld of %ld is not told\n", long(queries), long(keys),
                    long(failing), long(count));
        failures++;
      } catch (const std::runtime_error&) {
      }
    }
  }
  return failures;
}

}  // namespace
}  // namespace fastcl::cpu

int main() {
  int failures = 0;
  for (const int64_t queries : {1, 64, 300, 1000, 5000, 20000}) {
    failures += fastcl::cpu::check_plan(queries, queries, true);
    for (const int64_t keys : {1, 257, 4096, 30000})
      failures += fastcl::cpu::check_plan(queries, keys, false);
  }
  std::printf("turns: %s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
