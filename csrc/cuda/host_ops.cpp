// Ops that run the CUDA kernels on the host, a thread per warp, for the tests; and one that says what fits.
#include <torch/csrc/stable/library.h>

#include "cuda/enqueue.cuh"
#include "cuda/enqueue_op.h"
#include "cuda/one_launch.cuh"
#include "cuda/one_launch_op.h"

namespace fastcl {
namespace {

auto host_one_positive(Tensor query, Tensor positive, OptionalTensor negatives, Tensor scale,
                       OptionalTensor query_ids, OptionalTensor negative_ids, int64_t layout, bool normalize,
                       bool normalize_negatives, bool mean, int64_t needs, int64_t blocks,
                       int64_t shared_bytes) {
  const LossOutputs outputs(query, positive, negatives, scale, ScalarType::Float, needs);
  const float factor = static_cast<float>(*static_cast<const double*>(scale.const_data_ptr()));
  float factor_gradient;
  run_one_launch({query, positive, negatives, query_ids, negative_ids, static_cast<Layout>(layout), normalize,
                  normalize_negatives, mean},
                 outputs, {static_cast<int>(blocks), shared_bytes}, &factor,
                 outputs.scale.numel() ? &factor_gradient : nullptr, [](const auto& args) {
                   run_grid(args.plan.blocks, args.plan.shared_bytes(),
                            [&](const Block& block) { OneLaunchKernel(block, args).run(); });
                 });
  if (double* gradient = out_of<double>(outputs.scale)) *gradient = factor_gradient;
  return outputs.all();
}

void host_enqueue(Tensor keys, OptionalTensor ids, Tensor pointer, Tensor new_keys, OptionalTensor new_ids,
                  int64_t blocks) {
  const int grid = enqueue_blocks(new_keys.size(0), {static_cast<int>(blocks), 0});
  run_enqueue(keys, ids, pointer, new_keys, new_ids, [=](const auto& args) {
    run_grid(grid, 0, [&](const Block& block) { enqueue_rows(block, args); });
  });
}

bool one_launch_fits(int64_t layout, int64_t samples, int64_t negatives, int64_t blocks,
                     int64_t shared_bytes) {
  return make_plan(static_cast<Layout>(layout), samples, negatives, 1,
                   {static_cast<int>(blocks), shared_bytes})
      .has_value();
}

}  // namespace
}  // namespace fastcl

STABLE_TORCH_LIBRARY_FRAGMENT(fastcl_native, m) {
  m.def(
      "host_one_positive(Tensor query, Tensor positive, Tensor? negatives, Tensor scale, Tensor? query_ids, "
      "Tensor? negative_ids, int layout, bool normalize, bool normalize_negatives, bool mean, int needs, "
      "int blocks, int shared_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "host_enqueue(Tensor(a!) keys, Tensor(b!)? ids, Tensor(c!) pointer, Tensor new_keys, Tensor? new_ids, "
      "int blocks) -> ()");
  m.def("one_launch_fits(int layout, int samples, int negatives, int blocks, int shared_bytes) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CompositeExplicitAutograd, m) {
  m.impl("one_launch_fits", TORCH_BOX(&fastcl::one_launch_fits));
}
STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CPU, m) {
  m.impl("host_one_positive", TORCH_BOX(&fastcl::host_one_positive));
  m.impl("host_enqueue", TORCH_BOX(&fastcl::host_enqueue));
}
