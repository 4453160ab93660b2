// The extension's ops, in torch's stable ABI. But for the whole loss, where every microsecond counts,
// Python hands them inputs whose last dimension is contiguous, and the outputs.
#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "cpu/attend.h"
#include "cpu/mochi.h"
#include "cpu/one_positive.h"
#include "cpu/products.h"
#include "cpu/stats.h"
#include "cpu/sup_con.h"
#include "cpu/topk.h"
#include "tensors.h"

namespace fastcl {
namespace {

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      return DType::float32;
  }
}
template <class T>
const T* values_of(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}
bool is_double(const Tensor& x) { return dtype_of(x) == DType::float64; }

Input input_of(const Tensor& x) {
  return {x.const_data_ptr(), dtype_of(x), x.stride(0), x.size(0), x.size(1)};
}

// Rows times their factors (none: 1), of any dtype.
struct Side {
  Tensor rows;
  OptionalTensor factor;
};

// Rows of T; padded copies where they are not readable as such to a whole number of vectors.
template <class T>
Rows<T> rows_of(const Side& side, Buffer<T>& copy) {
  const Kernels<T>& k = kernels<T>();
  const Input x = input_of(side.rows);
  constexpr DType dtype = std::is_same_v<T, double> ? DType::float64 : DType::float32;
  if (x.dtype == dtype && x.width % k.vector == 0 && !side.factor)
    return {x.data, dtype, x.stride, x.count, x.width, true};
  const int64_t stride = round_up(x.width, k.vector);
  copy = allocate<T>(x.count * stride);
  k.load_rows(copy.get(), stride, x.data, x.dtype, x.stride, x.count, x.width, values_of<T>(side.factor));
  return {copy.get(), dtype, stride, x.count, x.width, true};
}

template <class T>
struct OwnedProblem {
  Buffer<T> query, key;
  BFloat16Side bfloat16_query, bfloat16_key;
  Problem<T> problem;

  OwnedProblem(const Side& x, const Side& y, double scale, const OptionalTensor& bias2,
               const OptionalTensor& exclude_query, const OptionalTensor& exclude_key,
               const OptionalTensor& positive_query, const OptionalTensor& positive_key, bool symmetric,
               Precision precision) {
    int parts = scale == 0 ? 0 : bfloat16_parts({dtype_of(x.rows), dtype_of(y.rows)}, precision);
    for (const Side* side : {&x, &y})
      if (parts && !products_fit(values_of<float>(side->factor), side->rows.size(0))) parts = 0;
    if (parts) {
      bfloat16_query = bfloat16_side({input_of(x.rows)}, values_of<float>(x.factor), parts);
      if (!symmetric) bfloat16_key = bfloat16_side({input_of(y.rows)}, values_of<float>(y.factor), parts);
      problem.bfloat16 = {bfloat16_query.rows, symmetric ? bfloat16_query.rows : bfloat16_key.rows, parts};
      problem.query.count = x.rows.size(0);
      problem.key.count = y.rows.size(0);
      problem.query.width = problem.key.width = x.rows.size(1);
    } else {
      problem.query = rows_of<T>(x, query);
      problem.key = symmetric ? problem.query : rows_of<T>(y, key);
    }
    problem.scale2 = static_cast<T>(scale * kLog2E);
    problem.bias2 = bias2 ? static_cast<const T*>(bias2->const_data_ptr()) : nullptr;
    problem.exclude = {ids_of(exclude_key), ids_of(exclude_query)};
    problem.positive = {ids_of(positive_key), ids_of(positive_query)};
    problem.symmetric = symmetric;
  }
};

// (5, N) statistics and (4, N) state of one side.
template <class T>
void write_state(const State<T>& state, int64_t count, const Tensor& statistics, const Tensor& saved) {
  T *out = out_of<T>(statistics), *kept = out_of<T>(saved);
  for_each_range(count, 1024, [&](int64_t begin, int64_t end, Scratch&) {
    for (int64_t i = begin; i < end; i++) {
      const LogSum<T> entries[] = {state.negative(i), state.positive(i)};
      for (int side = 0; side < 2; side++) {
        const T max = *entries[side].max, sum = entries[side].total();
        const bool empty = is_empty(max) && !std::isnan(sum);
        out[side * count + i] = log_sum_exp(max, sum);
        kept[2 * side * count + i] = empty ? -INFINITY : max;
        kept[(2 * side + 1) * count + i] = empty ? T(0) : sum;
      }
      const PositiveSums<T> positives = state.positive_sums(i);
      out[2 * count + i] = positives.sum.total() * static_cast<T>(kLn2);
      out[3 * count + i] = *positives.count;
      const T max = *entries[0].max, sum = entries[0].total();
      out[4 * count + i] = std::isnan(sum) ? sum : is_empty(max) ? -INFINITY : max * static_cast<T>(kLn2);
    }
  });
}

template <class T>
void run_stats_forward(const OwnedProblem<T>& owned, bool columns, const Tensor& rows,
                       const Tensor& row_state, const Tensor& column_stats, const Tensor& column_state,
                       const Tensor& weighted) {
  const Problem<T>& problem = owned.problem;
  const int64_t queries = problem.query.count;
  if (T* out = out_of<T>(weighted)) {
    const Attended<T> attended = attend(problem);
    write_state(attended.rows, queries, rows, row_state);
    for_each_range(queries, 64, [&](int64_t begin, int64_t end, Scratch&) {
      for (int64_t i = begin; i < end; i++) {
        const LogSum<T> entry = attended.rows.negative(i);
        const T factor = weight_factor(T(1), *entry.max, entry.total());
        for (int64_t d = 0; d < problem.query.width; d++)
          out[i * problem.query.width + d] = attended.query.row(0, i)[d] * factor;
      }
    });
    return;
  }
  const Statistics<T> stats = statistics(problem, columns);
  write_state(stats.rows, queries, rows, row_state);
  if (columns) write_state(stats.columns, problem.key.count, column_stats, column_state);
}

void stats_forward(Tensor x, OptionalTensor x_factor, Tensor y, OptionalTensor y_factor, double scale,
                   OptionalTensor bias2, OptionalTensor exclude_query, OptionalTensor exclude_key,
                   OptionalTensor positive_query, OptionalTensor positive_key, bool symmetric,
                   int64_t precision, bool columns, Tensor rows, Tensor row_state, Tensor column_stats,
                   Tensor column_state, Tensor weighted) {
  auto run = [&](auto zero) {
    const OwnedProblem<decltype(zero)> owned({x, x_factor}, {y, y_factor}, scale, bias2, exclude_query,
                                             exclude_key, positive_query, positive_key, symmetric,
                                             static_cast<Precision>(precision));
    run_stats_forward(owned, columns, rows, row_state, column_stats, column_state, weighted);
  };
  is_double(x) ? run(0.0) : run(0.0f);
}

// grad is (5, N), state (4, N).
template <class T>
SideWeights<T> side_weights(const Tensor& grad, const Tensor& state) {
  using W = SideWeights<T>;
  const int64_t count = grad.size(1);
  W weights = make_side_weights<T>(count);
  const T *g = static_cast<const T*>(grad.const_data_ptr()),
          *s = static_cast<const T*>(state.const_data_ptr());
  for (int64_t i = 0; i < count; i++) {
    for (int side = 0; side < 2; side++) {
      const T max = s[2 * side * count + i], sum = s[(2 * side + 1) * count + i];
      if (max > excluded_logit<T> / 2) weights.field(2 * side)[i] = max;
      weights.field(2 * side + 1)[i] = weight_factor(g[side * count + i], max, sum);
    }
    weights.field(W::kConstant)[i] = g[2 * count + i];
  }
  return weights;
}

template <class T>
void write_sums(const Partials<T>& sums, const Tensor& to) {
  T* out = out_of<T>(to);
  if (!out || !sums) return;
  const int64_t width = to.dim() == 1 ? 1 : to.size(1);
  for_each_range(sums.rows, 256, [&](int64_t begin, int64_t end, Scratch&) {
    for (int64_t i = begin; i < end; i++) {
      for (int64_t d = 0; d < width; d++) {
        T total = 0;
        for (int64_t p = 0; p < sums.parts; p++) total += sums.row(p, i)[d];
        out[i * width + d] = total;
      }
    }
  });
}

// sum_ij dl_ij <x_i, y_j>
template <class T>
double dot_of_rows(const Problem<T>& problem, const PairSums<T>& sums) {
  double total = 0;
  for (int64_t i = 0; i < problem.query.count; i++)
    for (int64_t p = 0; p < sums.query.parts; p++)
      total += kernels<T>().dot(problem.query.row(i), sums.query.row(p, i), sums.query.width);
  return problem.symmetric ? total / 2 : total;
}

void stats_backward(Tensor x, OptionalTensor x_factor, Tensor y, OptionalTensor y_factor, double scale,
                    OptionalTensor bias2, OptionalTensor exclude_query, OptionalTensor exclude_key,
                    OptionalTensor positive_query, OptionalTensor positive_key, bool symmetric,
                    int64_t precision, bool columns, Tensor grad_rows, Tensor row_state, Tensor grad_columns,
                    Tensor column_state, Tensor query_sums, Tensor key_sums, Tensor bias_sums,
                    Tensor scale_sum) {
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const OwnedProblem<T> owned({x, x_factor}, {y, y_factor}, scale, bias2, exclude_query, exclude_key,
                                positive_query, positive_key, symmetric, static_cast<Precision>(precision));
    const SideWeights<T> rows = side_weights<T>(grad_rows, row_state);
    const SideWeights<T> column_weights =
        columns ? side_weights<T>(grad_columns, column_state) : SideWeights<T>{};
    const PairSums<T> sums = pair_sums(
        owned.problem, rows, column_weights,
        {query_sums.numel() > 0, key_sums.numel() > 0, bias_sums.numel() > 0, scale_sum.numel() > 0});
    write_sums(sums.query, query_sums);
    write_sums(sums.key, key_sums);
    write_sums(sums.bias, bias_sums);
    if (double* out = out_of<double>(scale_sum))
      *out = sums.scale ? *sums.scale : dot_of_rows(owned.problem, sums);
  };
  is_double(x) ? run(0.0) : run(0.0f);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> one_positive_op(
    Tensor query, Tensor positive, OptionalTensor negatives, Tensor scale, OptionalTensor query_ids,
    OptionalTensor negative_ids, int64_t layout, bool normalize, bool normalize_negatives, bool mean,
    int64_t precision, int64_t needs) {
  query = row_contiguous(query);
  positive = row_contiguous(positive);
  if (negatives) negatives = row_contiguous(*negatives);
  const ScalarType dtype = is_double(query) ? ScalarType::Double : ScalarType::Float;
  const LossOutputs outputs(query, positive, negatives, scale, dtype, needs);
  const OnePositive args{input_of(query),
                         input_of(positive),
                         negatives ? input_of(*negatives) : Input{},
                         *static_cast<const double*>(scale.const_data_ptr()),
                         ids_of(query_ids),
                         ids_of(negative_ids),
                         static_cast<Layout>(layout),
                         normalize,
                         normalize_negatives,
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
                                                      bool normalize, bool log_of_mean, bool mean,
                                                      int64_t precision, int64_t needs) {
  query = row_contiguous(query);
  if (key) key = row_contiguous(*key);
  const ScalarType dtype = is_double(query) ? ScalarType::Double : ScalarType::Float;
  const Tensor loss = torch::stable::new_empty(query, {}, dtype),
               grad_query = output_like(query, query, dtype, needs & 1),
               grad_key = output_like(key.value_or(query), query, dtype, key && needs & 2),
               grad_scale = output_like(scale, scale, scale.scalar_type(), needs & 4);
  const SupCon args{input_of(query),
                    key ? input_of(*key) : Input{},
                    *static_cast<const double*>(scale.const_data_ptr()),
                    ids_of(query_labels),
                    ids_of(key_labels),
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

void topk_op(Tensor query, Tensor key, OptionalTensor exclude_query, OptionalTensor exclude_key,
             Tensor values, Tensor indices) {
  auto run = [&](auto zero) {
    using T = decltype(zero);
    OwnedProblem<T> owned({query, {}}, {key, {}}, 1.0, {}, exclude_query, exclude_key, {}, {}, false,
                          Precision::highest);
    owned.problem.scale2 = 1;  // similarities themselves
    topk<T>(owned.problem, values.size(1), out_of<T>(values), out_of<int64_t>(indices));
  };
  is_double(query) ? run(0.0) : run(0.0f);
}

void mochi_op(Tensor query, Tensor positive, Tensor keys, Tensor scale, Tensor first, Tensor second,
              Tensor alpha, Tensor partner, Tensor beta, int64_t n_hard, Tensor loss, Tensor grad_query,
              Tensor grad_positive, Tensor grad_scale) {
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
}

// Of the operands of products of such rows, for measurements.
int64_t operand_parts(Tensor x, int64_t precision) {
  return bfloat16_parts({dtype_of(x)}, static_cast<Precision>(precision));
}

// For measurements: the similarities of a tile's rows to themselves, again and again on every thread.
void repeat_logits(Tensor x, int64_t parts, int64_t repeats) {
  const Input rows = input_of(x);
  const BFloat16Side side = parts ? bfloat16_side({rows}, nullptr, static_cast<int>(parts)) : BFloat16Side{};
  Buffer<float> copy;
  Problem<float> problem;
  problem.query = problem.key = rows_of<float>({x, {}}, copy);
  problem.bfloat16 = {side.rows, side.rows, static_cast<int>(parts)};
  problem.scale2 = 1;
  for_each_task(torch::stable::get_num_threads(), [&](int64_t, Scratch& scratch) {
    const Tile<float> tile{scratch.take<float>(kTileSlot, rows.count * rows.count), rows.count, rows.count,
                           rows.count};
    const auto products = make_products(problem, rows.count, rows.count, scratch);
    products->set_lanes(0, rows.count);
    products->set_rows(0, rows.count);
    for (int64_t i = 0; i < repeats; i++) products->logits(tile);
  });
}

std::tuple<int64_t, int64_t> isa_levels() {
  return {static_cast<int64_t>(best_isa()), static_cast<int64_t>(current_isa())};
}
void force_isa_op(int64_t level) { force_isa(static_cast<Isa>(level)); }

}  // namespace
}  // namespace fastcl

STABLE_TORCH_LIBRARY(fastcl_native, m) {
  m.def(
      "stats_forward(Tensor x, Tensor? x_factor, Tensor y, Tensor? y_factor, float scale, Tensor? bias2, "
      "Tensor? exclude_query, Tensor? exclude_key, Tensor? positive_query, Tensor? positive_key, "
      "bool symmetric, int precision, bool columns, Tensor(a!) rows, "
      "Tensor(b!) row_state, Tensor(c!) columns_out, Tensor(d!) column_state, Tensor(e!) weighted) -> ()");
  m.def(
      "stats_backward(Tensor x, Tensor? x_factor, Tensor y, Tensor? y_factor, float scale, Tensor? bias2, "
      "Tensor? exclude_query, Tensor? exclude_key, Tensor? positive_query, Tensor? positive_key, "
      "bool symmetric, int precision, bool columns, Tensor grad_rows, "
      "Tensor row_state, Tensor grad_columns, Tensor column_state, Tensor(a!) query_sums, Tensor(b!) "
      "key_sums, "
      "Tensor(c!) bias_sums, Tensor(d!) scale_sum) -> ()");
  m.def(
      "topk(Tensor query, Tensor key, Tensor? exclude_query, Tensor? exclude_key, Tensor(a!) values, "
      "Tensor(b!) indices) -> ()");
  m.def(
      "mochi(Tensor query, Tensor positive, Tensor keys, Tensor scale, Tensor first, Tensor second, Tensor "
      "alpha, "
      "Tensor partner, Tensor beta, int n_hard, Tensor(a!) loss, Tensor(b!) grad_query, Tensor(c!) "
      "grad_positive, "
      "Tensor(d!) grad_scale) -> ()");
  m.def("repeat_logits(Tensor x, int parts, int repeats) -> ()");
  m.def("operand_parts(Tensor x, int precision) -> int");
  m.def("isa_levels() -> (int, int)");
  m.def("force_isa(int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CPU, m) {
  m.impl("stats_forward", TORCH_BOX(&fastcl::stats_forward));
  m.impl("stats_backward", TORCH_BOX(&fastcl::stats_backward));
  m.impl("mochi", TORCH_BOX(&fastcl::mochi_op));
  m.impl("topk", TORCH_BOX(&fastcl::topk_op));
  m.impl("repeat_logits", TORCH_BOX(&fastcl::repeat_logits));
  m.impl("operand_parts", TORCH_BOX(&fastcl::operand_parts));
}
STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CompositeExplicitAutograd, m) {
  m.impl("isa_levels", TORCH_BOX(&fastcl::isa_levels));
  m.impl("force_isa", TORCH_BOX(&fastcl::force_isa_op));
}
// the schemas are in Python
STABLE_TORCH_LIBRARY_IMPL(fastcl, CPU, m) {
  m.impl("one_positive", TORCH_BOX(&fastcl::one_positive_op));
  m.impl("sup_con", TORCH_BOX(&fastcl::sup_con_op));
}
