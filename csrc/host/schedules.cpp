// How the CPU divides its work, for a simulation of more cores than there are.
#include <torch/csrc/stable/library.h>

#include "call.h"
#include "cpu/run/plan.h"

namespace fastcl::cpu {
namespace {

// Pairs of the tiles of a task.
int64_t pairs_of(const Plan& plan, const Plan::Task& task) {
  int64_t pairs = 0;
  for (int64_t i = plan.query.first_block(task.query_group); i < plan.query.first_block(task.query_group + 1);
       i++) {
    const int64_t lanes = std::min(plan.query.block, plan.query.count - i * plan.query.block);
    const int64_t first = task.on_diagonal ? i : plan.key.first_block(task.key_group);
    const int64_t begin = std::min(first * plan.key.block, plan.key.count);
    pairs += lanes * (plan.key.end(task.key_group) - begin);
  }
  return pairs;
}

// (tasks, 3) in their order: the sums that each adds to, in turns with all others of the same number, and its
// pairs. `like` is of any shape.
Tensor plan(Tensor like, int64_t queries, int64_t keys, bool symmetric) {
  const Plan plan = make_plan(queries, keys, symmetric);
  const int64_t tasks = plan.tasks.size(), query_sums = plan.query.groups * plan.query.copies;
  const Tensor out = torch::stable::new_empty(like, {tasks, 3}, torch::headeronly::ScalarType::Long);
  int64_t* row = static_cast<int64_t*>(out.mutable_data_ptr());
  for (const Plan::Task& task : plan.tasks) {
    const int64_t key = task.key_group * plan.key.copies + task.key_copy;
    *row++ = task.query_group * plan.query.copies + task.query_copy;
    *row++ = symmetric ? key : query_sums + key;
    *row++ = pairs_of(plan, task);
  }
  return out;
}

// For how many threads a pass over the keys is divided.
int64_t parts(Tensor, int64_t queries, int64_t keys) { return parts_of_keys(queries, keys); }

}  // namespace
}  // namespace fastcl::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastcl_host, m) {
  m.def("plan(Tensor like, int queries, int keys, bool symmetric) -> Tensor");
  m.def("parts_of_keys(Tensor like, int queries, int keys) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastcl_host, CPU, m) {
  m.impl("plan", TORCH_BOX(&fastcl::cpu::plan));
  m.impl("parts_of_keys", TORCH_BOX(&fastcl::cpu::parts));
}
