// The ops of sums of softplus.
#include <torch/csrc/stable/library.h>

#include "call.h"

namespace fastcl::cpu {
namespace {

// The gradients that are wanted of the inputs.
struct LogisticOutputs {
  Tensor query, key, scale, bias;

  LogisticOutputs(const Tensor& x, const Tensor& y, const Tensor& factor, const Tensor& offset, int64_t needs)
      : query(output_like(x, x, compute_type(x), needed(needs, 0))),
        key(output_like(y, x, compute_type(x), needed(needs, 1))),
        scale(output_like(factor, factor, ScalarType::Double, needed(needs, 2))),
        bias(output_like(offset, x, compute_type(x), needed(needs, 3))) {}

  template <class T>
  LogisticGradients<T> as() const {
    return {out_of<T>(query), out_of<T>(key), out_of<double>(scale), out_of<T>(bias)};
  }
};

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
  const LogisticOutputs grads(query, key, scale, bias, needs);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    similarity_logistic_backward<T>(args.call, static_cast<const T*>(bias.const_data_ptr()),
                                    static_cast<const T*>(grad.const_data_ptr()), grads.as<T>());
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return {grads.query, grads.key, grads.scale, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logistic_total(
    Tensor query, Tensor key, Tensor scale, Tensor bias, std::vector<Tensor> exclude,
    std::vector<Tensor> positive, OptionalTensor within_query, OptionalTensor within_key,
    OptionalTensor exclude_keys, bool normalize, int64_t precision, bool mean, int64_t needs) {
  const StatsCall args(query, key, scale, {}, {},
                       {exclude, positive, {}, within_query, within_key, exclude_keys}, normalize, false,
                       precision, false);
  bias = torch::stable::contiguous(bias);
  const Tensor total = torch::stable::new_empty(query, {}, compute_type(query));
  const LogisticOutputs grads(query, key, scale, bias, needs);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    similarity_logistic_total<T>(args.call, static_cast<const T*>(bias.const_data_ptr()), mean,
                                 static_cast<T*>(total.mutable_data_ptr()), grads.as<T>());
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return {total, grads.query, grads.key, grads.scale, grads.bias};
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
  m.def(("logistic_total" + call + ", bool mean, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
            .c_str());
}
STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CPU, m) {
  m.impl("logistic", TORCH_BOX(&fastcl::cpu::logistic));
  m.impl("logistic_backward", TORCH_BOX(&fastcl::cpu::logistic_backward));
  m.impl("logistic_total", TORCH_BOX(&fastcl::cpu::logistic_total));
}
