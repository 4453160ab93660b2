// The CUDA backend's ops that need no device: what would fit on one, and the schemas of those that run there.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/mochi.cuh"
#include "cuda/one_launch.cuh"

namespace fastcl::cuda {
namespace {

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
      "mix_negatives(Tensor query, Tensor positive, Tensor scale, Tensor keys, Tensor hard, Tensor "
      "queue_max, "
      "Tensor queue_sum, Tensor queue_mean, Tensor first, Tensor second, Tensor alpha, Tensor partner, "
      "Tensor beta) -> (Tensor loss, Tensor grad_query, Tensor grad_positive, Tensor grad_scale)");
  m.def(
      "enqueue(Tensor(a!) keys, Tensor(b!)? ids, Tensor(c!) pointer, Tensor new_keys, Tensor? new_ids) -> "
      "()");
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
