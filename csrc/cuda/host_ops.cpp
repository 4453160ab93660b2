// Ops that run the CUDA kernels on the host, a thread per warp, for the tests; and some that say what fits.
#include <torch/csrc/stable/library.h>

#include <string>

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

auto host_one_positive(Tensor query, Tensor positive, OptionalTensor negatives, Tensor scale,
                       OptionalTensor query_ids, OptionalTensor negative_ids, int64_t layout, bool normalize,
                       bool normalize_negatives, bool decoupled, bool mean, int64_t /*precision*/,
                       int64_t needs, int64_t blocks, int64_t shared_bytes) {
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

auto host_sup_con(Tensor query, OptionalTensor key, Tensor scale, Tensor query_labels,
                  OptionalTensor key_labels, OptionalTensor positive_mask, bool normalize, bool log_of_mean,
                  bool mean, int64_t /*precision*/, int64_t needs, int64_t blocks, int64_t shared_bytes) {
  STD_TORCH_CHECK(!positive_mask, "the CUDA kernels take labels, no mask");
  const auto outputs = allocated("one_launch", [&] { return SupConOutputs(query, key, scale, needs); });
  run_with_scale(scale, outputs.scale, blocks, shared_bytes, [&](const Target& target, const auto& launch) {
    run_sup_con({query, key, query_labels, key_labels, normalize, log_of_mean, mean}, outputs, target,
                launch);
  });
  return outputs.all();
}

void host_enqueue(Tensor keys, OptionalTensor ids, Tensor pointer, Tensor new_keys, OptionalTensor new_ids,
                  int64_t blocks) {
  const int grid = enqueue_blocks(new_keys.size(0), {static_cast<int>(blocks), 0});
  run_enqueue(keys, ids, pointer, new_keys, new_ids, [=](const auto& args) {
    run_grid(grid, 0, [&](const Block& block) { enqueue_rows(block, args); });
  });
}

auto host_mix_negatives(Tensor query, Tensor positive, Tensor scale, Tensor keys, Tensor hard,
                        Tensor queue_max, Tensor queue_sum, Tensor queue_mean, Tensor first, Tensor second,
                        Tensor alpha, Tensor partner, Tensor beta, int64_t blocks, int64_t shared_bytes) {
  const auto outputs = allocated("mix_negatives", [&] { return MixingOutputs(query); });
  run_mixing({query, positive, scale, keys, hard, queue_max, queue_sum, queue_mean, first, second, alpha,
              partner, beta},
             outputs, {static_cast<int>(blocks), shared_bytes},
             [](const auto& args, int grid, int64_t bytes) {
               run_grid(grid, bytes, [&](const Block& block) { MixingKernel(block, args).run(); });
             });
  return outputs.all();
}

template <class Loss>
bool fits(const Matrix& matrix, int64_t element_bytes, int64_t blocks, int64_t shared_bytes) {
  return make_plan(matrix, 1, static_cast<int>(element_bytes), line_bytes<Loss>(),
                   {static_cast<int>(blocks), shared_bytes})
      .has_value();
}
bool one_positive_fits(int64_t layout, int64_t samples, int64_t negatives, int64_t element_bytes,
                       int64_t blocks, int64_t shared_bytes) {
  return fits<OnePositiveLoss>(Matrix::one_positive(static_cast<Layout>(layout), samples, negatives),
                               element_bytes, blocks, shared_bytes);
}
bool sup_con_fits(int64_t queries, std::optional<int64_t> keys, int64_t element_bytes, int64_t blocks,
                  int64_t shared_bytes) {
  return fits<SupConLoss>(Matrix::all_pairs(queries, keys), element_bytes, blocks, shared_bytes);
}
bool mixing_fits(int64_t width, int64_t n_hard, int64_t synthetics, int64_t shared_bytes) {
  return MixingFloats(width, n_hard, synthetics).bytes() <= shared_bytes;
}

}  // namespace
}  // namespace fastcl::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastcl_native, m) {
  m.def(
      "host_one_positive(Tensor query, Tensor positive, Tensor? negatives, Tensor scale, Tensor? query_ids, "
      "Tensor? negative_ids, int layout, bool normalize, bool normalize_negatives, bool decoupled, bool "
      "mean, int precision, "
      "int needs, "
      "int blocks, int shared_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "host_sup_con(Tensor query, Tensor? key, Tensor scale, Tensor query_labels, Tensor? key_labels, "
      "Tensor? positive_mask, bool normalize, bool log_of_mean, bool mean, int precision, int needs, int "
      "blocks, int shared_bytes) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // on the device and, for the tests, on the host
  const std::string mixing =
      "(Tensor query, Tensor positive, Tensor scale, Tensor keys, Tensor hard, Tensor queue_max, Tensor "
      "queue_sum, Tensor queue_mean, Tensor first, Tensor second, Tensor alpha, Tensor partner, Tensor beta";
  const char* mixed = ") -> (Tensor loss, Tensor grad_query, Tensor grad_positive, Tensor grad_scale)";
  m.def(("mix_negatives" + mixing + mixed).c_str());
  m.def(("host_mix_negatives" + mixing + ", int blocks, int shared_bytes" + mixed).c_str());
  const std::string enqueue =
      "(Tensor(a!) keys, Tensor(b!)? ids, Tensor(c!) pointer, Tensor new_keys, Tensor? new_ids";
  m.def(("enqueue" + enqueue + ") -> ()").c_str());
  m.def(("host_enqueue" + enqueue + ", int blocks) -> ()").c_str());
  m.def("mixing_fits(int width, int n_hard, int synthetics, int shared_bytes) -> bool");
  m.def(
      "one_positive_fits(int layout, int samples, int negatives, int element_bytes, int blocks, "
      "int shared_bytes) -> bool");
  m.def("sup_con_fits(int queries, int? keys, int element_bytes, int blocks, int shared_bytes) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CompositeExplicitAutograd, m) {
  m.impl("one_positive_fits", TORCH_BOX(&fastcl::cuda::one_positive_fits));
  m.impl("sup_con_fits", TORCH_BOX(&fastcl::cuda::sup_con_fits));
  m.impl("mixing_fits", TORCH_BOX(&fastcl::cuda::mixing_fits));
}
STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CPU, m) {
  m.impl("host_one_positive", TORCH_BOX(&fastcl::cuda::host_one_positive));
  m.impl("host_sup_con", TORCH_BOX(&fastcl::cuda::host_sup_con));
  m.impl("host_mix_negatives", TORCH_BOX(&fastcl::cuda::host_mix_negatives));
  m.impl("host_enqueue", TORCH_BOX(&fastcl::cuda::host_enqueue));
}
