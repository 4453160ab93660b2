// The one-launch kernel run on the host.
#pragma once

#include "cuda/one_launch.cuh"

namespace fastcl::cuda {

template <class T, class Loss>
void run_on_host(const OneLaunch<T>& args, const Loss& loss) {
  with_cell_type<T>(args.plan, [&](auto zero) {
    run_grid(args.plan.blocks, args.plan.shared_bytes(),
             [&](const Block& block) { OneLaunchKernel<T, decltype(zero), Loss>(block, args, loss).run(); });
  });
}

}  // namespace fastcl::cuda
