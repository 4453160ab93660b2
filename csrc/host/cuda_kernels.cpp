// Ops for the tests: the CUDA kernels on the host, a thread per warp.
#include <torch/csrc/stable/library.h>

#include "cuda/enqueue.cuh"
#include "cuda/enqueue_op.h"
#include "cuda/mochi.cuh"
#include "cuda/mochi_op.h"
#include "cuda/one_launch_host.h"
#include "cuda/one_launch_op.h"

namespace fastcl::cuda {
namespace {

// run(target, launch), with the scale, a float64 on the host, and its gradient as the kernels take them.
template <class Run>
void run_with_scale(const Tensor& scale, const Tensor& scale_gradient, int64_t blocks, int64_t shared_bytes,
                    const Run& run) {
  const Device device{static_cast<int>(blocks), shared_bytes};
  const float factor = static_cast<float>(*static_cast<const double*>(scale.const_data_ptr()));
  float factor_gradient;
  run(Target{device, &factor, scale_gradient.numel() ? &factor_gradient : nullptr},
      [](const auto& args, const auto& loss) { run_on_host(args, loss); });
  if (double* gradient = out_of<double>(scale_gradient)) *gradient = factor_gradient;
}

auto one_positive(Tensor query, Tensor positive, OptionalTensor negatives, Tensor scale,
                  OptionalTensor query_ids, OptionalTensor negative_ids, int64_t layout, bool normalize,
                  bool normalize_negatives, bool decoupled, bool mean, int64_t /*precision*/, int64_t needs,
                  int64_t blocks, int64_t shared_bytes) {
  STD_TORCH_CHECK(!decoupled, "the CUDA kernels have no decoupled loss");
  const auto outputs = allocated(
      "one_launch", [&] { return LossOutputs(query, positive, negatives, scale, ScalarType::Float, needs); });
  run_with_scale(scale, outputs.scale, blocks, shared_bytes, [&](const Target& target, const auto& launch) {
    run_one_positive({query, positive, negatives, query_ids, negative_ids, static_cast<Layout>(layout),
                      normalize, normalize_negatives, mean},
                     outputs, target, launch);
  });
  return outputs.all();
}

auto sup_con(Tensor query, OptionalTensor key, Tensor scale, Tensor query_labels, OptionalTensor key_labels,
             OptionalTensor positive_mask, bool normalize, bool log_of_mean, bool mean, int64_t /*precision*/,
             int64_t needs, int64_t blocks, int64_t shared_bytes) {
  STD_TORCH_CHECK(!positive_mask, "the CUDA kernels take labels, no mask");
  const auto outputs = allocated("one_launch", [&] { return SupConOutputs(query, key, scale, needs); });
  run_with_scale(scale, outputs.scale, blocks, shared_bytes, [&](const Target& target, const auto& launch) {
    run_sup_con({query, key, query_labels, key_labels, normalize, log_of_mean, mean}, outputs, target,
                launch);
  });
  return outputs.all();
}

void enqueue(Tensor keys, OptionalTensor ids, Tensor pointer, Tensor new_keys, OptionalTensor new_ids,
             int64_t blocks) {
  const int grid = enqueue_blocks(new_keys.size(0), {static_cast<int>(blocks), 0});
  run_enqueue(keys, ids, pointer, new_keys, new_ids, [=](const auto& args) {
    run_grid(grid, 0, [&](const Block& block) { enqueue_rows(block, args); });
  });
}

auto mix_negatives(Tensor query, Tensor positive, Tensor scale, Tensor keys, Tensor hard, Tensor queue_max,
                   Tensor queue_sum, Tensor queue_mean, Tensor first, Tensor second, Tensor alpha,
                   Tensor partner, Tensor beta, int64_t blocks, int64_t shared_bytes) {
  const auto outputs = allocated("mix_negatives", [&] { return MixingOutputs(query); });
  run_mixing({query, positive, scale, keys, hard, queue_max, queue_sum, queue_mean, first, second, alpha,
              partner, beta},
             outputs, {static_cast<int>(blocks), shared_bytes},
             [](const auto& args, int grid, int64_t bytes) {
               run_grid(grid, bytes, [&](const Block& block) { MixingKernel(block, args).run(); });
             });
  return outputs.all();
}

}  // namespace
}  // namespace fastcl::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastcl_host, m) {
  m.def(
      "one_positive(Tensor query, Tensor positive, Tensor? negatives, Tensor scale, Tensor? query_ids, "
      "Tensor? negative_ids, int layout, bool normalize, bool normalize_negatives, bool decoupled, bool "
      "mean, "
      "int precision, int needs, int blocks, int shared_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sup_con(Tensor query, Tensor? key, Tensor scale, Tensor query_labels, Tensor? key_labels, "
      "Tensor? positive_mask, bool normalize, bool log_of_mean, bool mean, int precision, int needs, "
      "int blocks, int shared_bytes) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mix_negatives(Tensor query, Tensor positive, Tensor scale, Tensor keys, Tensor hard, Tensor "
      "queue_max, "
      "Tensor queue_sum, Tensor queue_mean, Tensor first, Tensor second, Tensor alpha, Tensor partner, "
      "Tensor beta, int blocks, int shared_bytes) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "enqueue(Tensor(a!) keys, Tensor(b!)? ids, Tensor(c!) pointer, Tensor new_keys, Tensor? new_ids, "
      "int blocks) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastcl_host, CPU, m) {
  m.impl("one_positive", TORCH_BOX(&fastcl::cuda::one_positive));
  m.impl("sup_con", TORCH_BOX(&fastcl::cuda::sup_con));
  m.impl("mix_negatives", TORCH_BOX(&fastcl::cuda::mix_negatives));
  m.impl("enqueue", TORCH_BOX(&fastcl::cuda::enqueue));
}
