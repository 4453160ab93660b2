// The ops of sums of softplus.
#include <torch/csrc/stable/library.h>

#include "call.h"

namespace fastcl::cpu {
namespace {

Tensor logistic(Tensor query, Tensor key, Tensor scale, Tensor bias, std::vector<Tensor> exclude,
                std::vector<Tensor> positive, OptionalTensor within_query, OptionalTensor within_key,
                OptionalTensor exclude_keys, bool normalize, int64_t precision) {
  const StatsCall args(query, key, scale, {}, {},
                       {exclude, positive, {}, within_query, within_key, exclude_keys}, normalize, false,
                       precision, false);
  bias = torch::stable::contiguous(bias);
  const Tensor sums = torch::stable::new_empty(query, {2, query.size(0)}, compute_type(query));
  auto run = [&](auto zero) {
    using T = decltype(zero);
    similarity_logistic<T>(args.call, static_cast<const T*>(bias.const_data_ptr()),
                           static_cast<T*>(sums.mutable_data_ptr()));
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logistic_backward(
    Tensor query, Tensor key, Tensor scale, Tensor bias, std::vector<Tensor> exclude,
    std::vector<Tensor> positive, OptionalTensor within_query, OptionalTensor within_key,
    OptionalTensor exclude_keys, bool normalize, int64_t precision, Tensor grad, int64_t needs) {
  const StatsCall args(query, key, scale, {}, {},
                       {exclude, positive, {}, within_query, within_key, exclude_keys}, normalize, false,
                       precision, false);
  bias = torch::stable::contiguous(bias);
  grad = torch::stable::contiguous(grad);
  const ScalarType dtype = compute_type(query);
  const Tensor grad_query = output_like(query, query, dtype, needs & 1),
               grad_key = output_like(key, query, dtype, needs & 2),
               grad_scale = output_like(scale, scale, ScalarType::Double, needs & 4),
               grad_bias = output_like(bias, query, dtype, needs & 8);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    similarity_logistic_backward<T>(
        args.call, static_cast<const T*>(bias.const_data_ptr()), static_cast<const T*>(grad.const_data_ptr()),
        {out_of<T>(grad_query), out_of<T>(grad_key), out_of<double>(grad_scale), out_of<T>(grad_bias)});
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return {grad_query, grad_key, grad_scale, grad_bias};
}

}  // namespace
}  // namespace fastcl::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastcl_native, m) {
  const std::string call =
      "(Tensor query, Tensor key, Tensor scale, Tensor bias, Tensor[] exclude, Tensor[] positive, "
      "Tensor? within_query, Tensor? within_key, Tensor? exclude_keys, bool normalize, int precision";
  m.def(("logistic" + call + ") -> Tensor").c_str());
  m.def(
      ("logistic_backward" + call + ", Tensor grad, int needs) -> (Tensor, Tensor, Tensor, Tensor)").c_str());
}
STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CPU, m) {
  m.impl("logistic", TORCH_BOX(&fastcl::cpu::logistic));
  m.impl("logistic_backward", TORCH_BOX(&fastcl::cpu::logistic_backward));
}
