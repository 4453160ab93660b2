// The extension's ops, in torch's stable ABI, of tensors in any layout; ids are contiguous.
#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "call.h"
#include "cpu/losses/attend.h"
#include "cpu/losses/mochi.h"
#include "cpu/losses/one_positive.h"
#include "cpu/losses/sup_con.h"
#include "cpu/simd/isa.h"
#include "fields.h"

namespace fastcl::cpu {
namespace {

// The rows of a contiguous (N, M, D), one after the other.
Input every_row_of(const Tensor& x) {
  return {x.const_data_ptr(), dtype_of(x), x.size(2), x.size(0) * x.size(1), x.size(2)};
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors stats_forward(Tensor query, Tensor key, Tensor scale, OptionalTensor key_scale,
                          OptionalTensor bias2, std::vector<Tensor> exclude, std::vector<Tensor> positive,
                          OptionalTensor within_query, OptionalTensor within_key, OptionalTensor exclude_keys,
                          bool normalize, bool symmetric, int64_t precision, bool columns,
                          double second_scale, bool weighted) {
  const StatsCall args(query, key, scale, key_scale, bias2,
                       {exclude, positive, {}, within_query, within_key, exclude_keys}, normalize, symmetric,
                       precision, columns, second_scale);
  const int64_t n = query.size(0), m = columns ? key.size(0) : 0;
  auto output = [&](int64_t rows, int64_t width) {
    return torch::stable::new_empty(query, {rows, width}, compute_type(query));
  };
  constexpr int64_t kStatistics = StatisticsFields::kCount, kState = StateFields::kCount;
  const Tensor rows = output(kStatistics, n), row_state = output(kState, n),
               column_stats = output(kStatistics, m), column_state = output(kState, m),
               of_keys = output_like(query, query, compute_type(query), weighted);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    auto data = [](const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); };
    similarity_forward<T>(args.call, {data(rows), data(row_state), data(column_stats), data(column_state),
                                      weighted ? data(of_keys) : nullptr});
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return {rows, row_state, column_stats, column_state, of_keys};
}

FiveTensors stats_backward(Tensor query, Tensor key, Tensor scale, OptionalTensor key_scale,
                           OptionalTensor bias2, std::vector<Tensor> exclude, std::vector<Tensor> positive,
                           OptionalTensor within_query, OptionalTensor within_key,
                           OptionalTensor exclude_keys, bool normalize, bool symmetric, int64_t precision,
                           bool columns, double second_scale, Tensor grad_rows, Tensor row_state,
                           Tensor grad_columns, Tensor column_state, int64_t needs) {
  const StatsCall args(query, key, scale, key_scale, bias2,
                       {exclude, positive, {}, within_query, within_key, exclude_keys}, normalize, symmetric,
                       precision, columns, second_scale);
  const ScalarType dtype = compute_type(query);
  const bool per_key = needs & (Needs::kKeyBias | Needs::kKeyScale);
  const Tensor keys = torch::stable::new_empty(query, {per_key ? key.size(0) : 0}, dtype);
  const Tensor grad_query = output_like(query, query, dtype, needs & Needs::kQuery),
               grad_key = output_like(key, query, dtype, needs & Needs::kKey),
               grad_scale = output_like(scale, scale, ScalarType::Double, needs & Needs::kScale),
               grad_bias = output_like(keys, query, dtype, needs & Needs::kKeyBias),
               grad_key_scale = output_like(keys, query, dtype, needs & Needs::kKeyScale);
  const Tensor saved[] = {torch::stable::contiguous(grad_rows), torch::stable::contiguous(row_state),
                          torch::stable::contiguous(grad_columns), torch::stable::contiguous(column_state)};
  auto run = [&](auto zero) {
    using T = decltype(zero);
    auto in = [&](int i) { return static_cast<const T*>(saved[i].const_data_ptr()); };
    auto out = [&](const Tensor& x, int64_t need) {
      return needs & need ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
    };
    similarity_backward<T>(
        args.call, {in(0), in(1), in(2), in(3)},
        {out(grad_query, Needs::kQuery), out(grad_key, Needs::kKey),
         needs & Needs::kScale ? static_cast<double*>(grad_scale.mutable_data_ptr()) : nullptr,
         out(grad_bias, Needs::kKeyBias), out(grad_key_scale, Needs::kKeyScale)});
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return {grad_query, grad_key, grad_scale, grad_bias, grad_key_scale};
}

FiveTensors one_positive_op(Tensor query, OptionalTensor positive, OptionalTensor negatives, Tensor scale,
                            OptionalTensor query_ids, OptionalTensor negative_ids, int64_t layout,
                            bool normalize, bool normalize_negatives, bool decoupled, bool mean,
                            int64_t precision, int64_t needs) {
  query = row_contiguous(query);
  if (positive) positive = row_contiguous(*positive);
  const bool paired = static_cast<Layout>(layout) == Layout::paired;
  if (negatives) negatives = paired ? torch::stable::contiguous(*negatives) : row_contiguous(*negatives);
  const ScalarType dtype = is_double(query) ? ScalarType::Double : ScalarType::Float;
  const LossOutputs outputs(query, positive, negatives, scale, dtype, needs);
  const OnePositive args{input_of(query),
                         positive ? input_of(*positive) : Input{},
                         paired      ? every_row_of(*negatives)
                         : negatives ? input_of(*negatives)
                                     : Input{},
                         *static_cast<const double*>(scale.const_data_ptr()),
                         ids_of(query_ids),
                         ids_of(negative_ids),
                         static_cast<Layout>(layout),
                         normalize,
                         normalize_negatives,
                         decoupled,
                         mean,
                         static_cast<Precision>(precision)};
  auto run = [&](auto zero) {
    using T = decltype(zero);
    one_positive<T>(args, {out_of<T>(outputs.loss), out_of<T>(outputs.query), out_of<T>(outputs.positive),
                           out_of<T>(outputs.negatives), out_of<double>(outputs.scale)});
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return outputs.all();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sup_con_op(Tensor query, OptionalTensor key, Tensor scale,
                                                      Tensor query_labels, OptionalTensor key_labels,
                                                      OptionalTensor positive_mask, bool normalize,
                                                      bool log_of_mean, bool mean, int64_t precision,
                                                      int64_t needs) {
  query = row_contiguous(query);
  if (key) key = row_contiguous(*key);
  const ScalarType dtype = is_double(query) ? ScalarType::Double : ScalarType::Float;
  const Tensor loss = torch::stable::new_empty(query, {}, dtype),
               grad_query = output_like(query, query, dtype, needed(needs, 0)),
               grad_key = output_like(key.value_or(query), query, dtype, key && needed(needs, 1)),
               grad_scale = output_like(scale, scale, scale.scalar_type(), needed(needs, 2));
  const SupCon args{input_of(query),
                    key ? input_of(*key) : Input{},
                    *static_cast<const double*>(scale.const_data_ptr()),
                    ids_of(query_labels),
                    ids_of(key_labels),
                    positive_mask ? mask_of(*positive_mask) : Mask{},
                    normalize,
                    log_of_mean,
                    mean,
                    static_cast<Precision>(precision)};
  auto run = [&](auto zero) {
    using T = decltype(zero);
    sup_con<T>(args,
               {out_of<T>(loss), out_of<T>(grad_query), out_of<T>(grad_key), out_of<double>(grad_scale)});
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return {loss, grad_query, grad_key, grad_scale};
}

std::tuple<Tensor, Tensor> topk_op(Tensor query, Tensor key, int64_t k, std::vector<Tensor> exclude,
                                   std::vector<Tensor> only, OptionalTensor within_query,
                                   OptionalTensor within_key, OptionalTensor exclude_keys,
                                   OptionalTensor below, bool largest, bool normalize) {
  const StatsCall args(query, key, {}, {}, {}, {exclude, {}, only, within_query, within_key, exclude_keys},
                       normalize, false, 0, false);
  if (below) below = torch::stable::contiguous(*below);
  const Tensor values = torch::stable::new_empty(query, {query.size(0), k}, compute_type(query)),
               indices = torch::stable::new_empty(query, {query.size(0), k}, ScalarType::Long);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    similarity_topk<T>(
        args.call, k, largest, below ? static_cast<const T*>(below->const_data_ptr()) : nullptr,
        static_cast<T*>(values.mutable_data_ptr()), static_cast<int64_t*>(indices.mutable_data_ptr()));
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return {values, indices};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mochi_op(Tensor query, Tensor positive, Tensor keys, Tensor scale,
                                                    Tensor first, Tensor second, Tensor alpha, Tensor partner,
                                                    Tensor beta, int64_t n_hard) {
  for (Tensor* rows : {&query, &positive, &keys}) *rows = row_contiguous(*rows);
  for (Tensor* draws : {&first, &second, &alpha, &partner, &beta}) *draws = torch::stable::contiguous(*draws);
  const ScalarType dtype = compute_type(query);
  auto of_rows = [&] { return torch::stable::new_empty(query, {query.size(0)}, dtype); };
  const Tensor loss = of_rows(), grad_query = output_like(query, query, dtype, true),
               grad_positive = output_like(query, query, dtype, true), grad_scale = of_rows();
  auto run = [&](auto zero) {
    using T = decltype(zero);
    auto weights = [](const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); };
    auto ranks = [](const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); };
    const Mochi<T> args{input_of(query), input_of(positive),
                        input_of(keys),  *static_cast<const double*>(scale.const_data_ptr()),
                        n_hard,          first.size(1),
                        partner.size(1), ranks(first),
                        ranks(second),   ranks(partner),
                        weights(alpha),  weights(beta)};
    mochi<T>(args, {out_of<T>(loss), out_of<T>(grad_query), out_of<T>(grad_positive), out_of<T>(grad_scale)});
  };
  is_double(query) ? run(0.0) : run(0.0f);
  return {loss, grad_query, grad_positive, grad_scale};
}

std::tuple<int64_t, int64_t> isa_levels() {
  return {static_cast<int64_t>(best_isa()), static_cast<int64_t>(current_isa())};
}
void force_isa_op(int64_t level) { force_isa(static_cast<Isa>(level)); }

}  // namespace
}  // namespace fastcl::cpu

STABLE_TORCH_LIBRARY(fastcl_native, m) {
  const std::string problem =
      "(Tensor query, Tensor key, Tensor scale, Tensor? key_scale, Tensor? bias2, Tensor[] exclude, "
      "Tensor[] positive, Tensor? within_query, Tensor? within_key, Tensor? exclude_keys, bool normalize, "
      "bool symmetric, int precision, bool columns, float second_scale";
  const std::string five = ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)";
  m.def(("stats_forward" + problem + ", bool weighted" + five).c_str());
  m.def(("stats_backward" + problem +
         ", Tensor grad_rows, Tensor row_state, Tensor grad_columns, Tensor column_state, int needs" + five)
            .c_str());
  m.def(
      "topk(Tensor query, Tensor key, int k, Tensor[] exclude, Tensor[] only, Tensor? within_query, "
      "Tensor? within_key, Tensor? exclude_keys, Tensor? below, bool largest, bool normalize) -> "
      "(Tensor, Tensor)");
  m.def(
      "mochi(Tensor query, Tensor positive, Tensor keys, Tensor scale, Tensor first, Tensor second, "
      "Tensor alpha, Tensor partner, Tensor beta, int n_hard) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("isa_levels() -> (int, int)");
  m.def("force_isa(int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CPU, m) {
  m.impl("stats_forward", TORCH_BOX(&fastcl::cpu::stats_forward));
  m.impl("stats_backward", TORCH_BOX(&fastcl::cpu::stats_backward));
  m.impl("mochi", TORCH_BOX(&fastcl::cpu::mochi_op));
  m.impl("topk", TORCH_BOX(&fastcl::cpu::topk_op));
}
STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CompositeExplicitAutograd, m) {
  m.impl("isa_levels", TORCH_BOX(&fastcl::cpu::isa_levels));
  m.impl("force_isa", TORCH_BOX(&fastcl::cpu::force_isa_op));
}
// the schemas are in Python
STABLE_TORCH_LIBRARY_IMPL(fastcl, CPU, m) {
  m.impl("one_positive", TORCH_BOX(&fastcl::cpu::one_positive_op));
  m.impl("sup_con", TORCH_BOX(&fastcl::cpu::sup_con_op));
}
