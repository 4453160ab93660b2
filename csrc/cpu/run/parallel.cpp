#include "cpu/run/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace fastcl::cpu {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void on_threads(int64_t threads, const std::function<void()>& work) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
}

}  // namespace fastcl::cpu
