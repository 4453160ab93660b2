// The ops of cross-entropy with soft targets, and of such targets' potentials.
#include <torch/csrc/stable/library.h>

#include "call.h"
#include "cpu/losses/soft_targets.h"

namespace fastcl::cpu {
namespace {

// Keeps what the arguments of an op point into. Queries are (V, N, D) and contiguous.
struct SoftTargets {
  StatsCall views, teachers;
  OptionalTensor bias2;
  SoftTargetCall call;

  SoftTargets(const Tensor& query, const Tensor& key, const Tensor& scale, const Tensor& target_query,
              const Tensor& target_key, const Tensor& target_scale, const OptionalTensor& target_bias2,
              const RuleArguments& rule, bool normalize, int64_t precision)
      : views(stacked(query), key, scale, {}, {}, rule, normalize, false, precision, false),
        teachers(stacked(target_query), target_key, target_scale, {}, {}, {}, normalize, false, precision,
                 false) {
    if (target_bias2) bias2 = torch::stable::contiguous(*target_bias2);
    call = {{views.call.query, views.call.key, views.call.scale},
            {teachers.call.query, teachers.call.key, teachers.call.scale},
            bias2 ? bias2->const_data_ptr() : nullptr,
            views.call.rule,
            query.size(1),
            normalize,
            views.call.precision};
  }

 private:
  static Tensor stacked(const Tensor& x) {
    return torch::stable::view(torch::stable::contiguous(x), {x.size(0) * x.size(1), x.size(2)});
  }
};

std::tuple<Tensor, Tensor, Tensor> soft_cross_entropy_op(
    Tensor query, Tensor key, Tensor scale, Tensor target_query, Tensor target_key, Tensor target_scale,
    OptionalTensor target_bias2, OptionalTensor within_query, OptionalTensor within_key,
    OptionalTensor exclude_keys, std::vector<Tensor> exclude, bool normalize, int64_t precision,
    int64_t kept) {
  const SoftTargets args(query, key, scale, target_query, target_key, target_scale, target_bias2,
                         {exclude, {}, {}, within_query, within_key, exclude_keys}, normalize, precision);
  const int64_t views = query.size(0), count = query.size(1);
  const Tensor losses = torch::stable::new_empty(query, {views, count}, compute_type(query)),
               state = torch::stable::new_empty(query, {2 * (views + target_query.size(0)), count},
                                                compute_type(query)),
               logits = torch::stable::new_empty(query, {kept}, compute_type(query));
  STD_TORCH_CHECK(!kept || kept == logits_to_keep(args.call), "all logits are kept, or none");
  auto run = [&](auto zero) {
    using T = decltype(zero);
    soft_cross_entropy<T>(args.call, static_cast<T*>(losses.mutable_data_ptr()),
                          static_cast<T*>(state.mutable_data_ptr()), out_of<T>(logits));
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return {losses, state, logits};
}

std::tuple<Tensor, Tensor, Tensor> soft_cross_entropy_backward_op(
    Tensor query, Tensor key, Tensor scale, Tensor target_query, Tensor target_key, Tensor target_scale,
    OptionalTensor target_bias2, OptionalTensor within_query, OptionalTensor within_key,
    OptionalTensor exclude_keys, std::vector<Tensor> exclude, bool normalize, int64_t precision, Tensor grad,
    Tensor state, Tensor kept, int64_t needs) {
  const SoftTargets args(query, key, scale, target_query, target_key, target_scale, target_bias2,
                         {exclude, {}, {}, within_query, within_key, exclude_keys}, normalize, precision);
  grad = torch::stable::contiguous(grad);
  state = torch::stable::contiguous(state);
  const ScalarType dtype = compute_type(query);
  const Tensor grad_query = output_like(query, query, dtype, needs & 1),
               grad_key = output_like(key, query, dtype, needs & 2),
               grad_scale = output_like(scale, scale, ScalarType::Double, needs & 4);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    soft_cross_entropy_backward<T>(args.call, static_cast<const T*>(grad.const_data_ptr()),
                                   static_cast<const T*>(state.const_data_ptr()),
                                   kept.numel() ? static_cast<const T*>(kept.const_data_ptr()) : nullptr,
                                   {out_of<T>(grad_query), out_of<T>(grad_key), out_of<double>(grad_scale)});
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return {grad_query, grad_key, grad_scale};
}

Tensor sinkhorn_op(Tensor query, Tensor key, Tensor scale, int64_t steps, bool normalize, int64_t precision) {
  const StatsCall args(query, key, scale, {}, {}, {}, normalize, false, precision, false);
  const Tensor of_keys = torch::stable::new_empty(query, {key.size(0)}, compute_type(query));
  auto run = [&](auto zero) {
    using T = decltype(zero);
    similarity_sinkhorn<T>(args.call, steps, static_cast<T*>(of_keys.mutable_data_ptr()));
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return of_keys;
}

}  // namespace
}  // namespace fastcl::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastcl_native, m) {
  const std::string call =
      "(Tensor query, Tensor key, Tensor scale, Tensor target_query, Tensor target_key, Tensor target_scale, "
      "Tensor? target_bias2, Tensor? within_query, Tensor? within_key, Tensor? exclude_keys, "
      "Tensor[] exclude, bool normalize, int precision";
  m.def(("soft_cross_entropy" + call + ", int kept) -> (Tensor, Tensor, Tensor)").c_str());
  m.def(
      "sinkhorn(Tensor query, Tensor key, Tensor scale, int steps, bool normalize, int precision) -> Tensor");
  m.def(("soft_cross_entropy_backward" + call +
         ", Tensor grad, Tensor state, Tensor kept, int needs) -> (Tensor, Tensor, Tensor)")
            .c_str());
}
STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CPU, m) {
  m.impl("soft_cross_entropy", TORCH_BOX(&fastcl::cpu::soft_cross_entropy_op));
  m.impl("sinkhorn", TORCH_BOX(&fastcl::cpu::sinkhorn_op));
  m.impl("soft_cross_entropy_backward", TORCH_BOX(&fastcl::cpu::soft_cross_entropy_backward_op));
}
