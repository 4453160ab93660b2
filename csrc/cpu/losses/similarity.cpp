#include "cpu/losses/similarity.h"

#include <type_traits>

#include "cpu/losses/attend.h"
#include "cpu/losses/logistic.h"
#include "cpu/losses/sinkhorn.h"
#include "cpu/losses/topk.h"
#include "fields.h"

namespace fastcl::cpu {

namespace {

template <class T>
constexpr DType kOwnType = std::is_same_v<T, double> ? DType::float64 : DType::float32;

// One side's rows: as they came where a kernel can read them so, else unit rows, times a factor in products.
template <class T>
struct Side {
  UnitRows<T> unit;  // empty where the rows are used as they are
  Buffer<T> scaled;
  Rows<T> rows;
};

template <class T>
Side<T> make_side(const Input& input, bool normalize, const T* factor) {
  const Kernels<T>& k = kernels<T>();
  Side<T> side;
  if (!normalize && !factor && input.dtype == kOwnType<T> && input.width % k.vector == 0) {
    side.rows = {input.data, input.dtype, input.stride, input.count, input.width, true};
    return side;
  }
  side.unit = unit_rows<T>({input}, normalize);
  side.rows = side.unit.as_rows();
  if (factor) {
    side.scaled = allocate<T>(input.count * side.unit.stride);
    k.load_rows(side.scaled.get(), side.unit.stride, side.unit.rows.get(), kOwnType<T>, side.unit.stride,
                input.count, side.unit.stride, factor);
    side.rows.data = side.scaled.get();
  }
  return side;
}

// Of the negatives, then of the positives.
constexpr int kLses[] = {StatisticsFields::kLseNeg, StatisticsFields::kLsePos},
              kMaxima[] = {StateFields::kNegMax, StateFields::kPosMax},
              kTotals[] = {StateFields::kNegTotal, StateFields::kPosTotal};

enum class Use { similarities, statistics, gradients };

// Whether the products of bfloat16 rows are normal numbers or zero: the units take others for zero.
bool products_are_normal(const Input& x, const Input& y) {
  constexpr uint16_t kTiny = 64 << 7, kMagnitude = 0x7fff;  // 2^-63
  for (const Input& input : {x, y}) {
    if (input.dtype != DType::bfloat16) return false;
    for (int64_t i = 0; i < input.count; i++) {
      const uint16_t* row = static_cast<const uint16_t*>(input.row(i));
      int tiny = 0;
      for (int64_t d = 0; d < input.width; d++)
        tiny |= (row[d] & kMagnitude) != 0 && (row[d] & kMagnitude) < kTiny;
      if (tiny) return false;
    }
  }
  return true;
}

template <class T>
class Similarity {
 public:
  Similarity(const SimilarityCall& call, Use use)
      : call_(call),
        key_scale_(static_cast<const T*>(call.key_scale)),
        bfloat16_fits_(call.scale != 0 &&
                       (use != Use::similarities || products_are_normal(call.query, call.key))),
        query_(side(call.query, nullptr, use)),
        key_(call.symmetric ? Side<T>{} : side(call.key, key_scale_, use)) {
    problem_.query = query_.rows;
    problem_.key = call.symmetric ? query_.rows : key_.rows;
    problem_.scale2 = static_cast<T>(call.scale * kLog2E);
    problem_.bias2 = static_cast<const T*>(call.bias2);
    set_rule();
    problem_.symmetric = call.symmetric;
    problem_.second_scale = static_cast<T>(call.second_scale);
    if constexpr (std::is_same_v<T, float>)
      if (bfloat16_fits_) set_bfloat16_rows();
  }

  void forward(const SimilarityResult<T>& result) const {
    const int64_t queries = problem_.query.count;
    if (result.weighted) {
      const Attended<T> attended = attend(problem_);
      write_state(attended.rows, queries, result.rows, result.row_state);
      return write_weighted(attended, result.weighted);
    }
    const Statistics<T> stats = statistics(problem_, call_.columns);
    write_state(stats.rows, queries, result.rows, result.row_state);
    if (call_.columns) write_state(stats.columns, problem_.key.count, result.columns, result.column_state);
  }

  void topk(int64_t k, bool largest, const T* below, T* values, int64_t* indices) {
    problem_.scale2 = largest ? 1 : -1;  // similarities themselves
    cpu::topk(problem_, k, values, indices, below);
  }

  void backward(const SimilaritySaved<T>& saved, const SimilarityGradients<T>& result) const {
    const int64_t queries = problem_.query.count, keys = problem_.key.count;
    const SideWeights<T> rows = side_weights(saved.grad_rows, saved.row_state, queries);
    const SideWeights<T> columns =
        call_.columns ? side_weights(saved.grad_columns, saved.column_state, keys) : SideWeights<T>{};
    const bool scale_wanted = result.scale != nullptr;
    const PairSums<T> sums = pair_sums(
        problem_, rows, columns,
        {result.query || scale_wanted, result.key || result.key_scale, result.bias != nullptr, scale_wanted});
    write_inputs(sums, result.query, result.key, result.scale, result.key_scale);
    write_bias(sums.bias, keys, result.bias);
  }

  void potentials(int64_t steps, T* of_keys) const { sinkhorn(problem_, steps, of_keys); }

  void logistic(const T* bias, T* sums) const {
    const Buffer<T> bias2 = padded(bias, problem_.query.count, static_cast<T>(kLog2E));
    logistic_sums(problem_, bias2.get(), sums);
  }

  void logistic_backward(const T* bias, const T* grad, const LogisticGradients<T>& result) const {
    const Buffer<T> bias2 = padded(bias, problem_.query.count, static_cast<T>(kLog2E));
    write_logistic(logistic_pair_sums(problem_, bias2.get(), grad, wanted_of(result)), result);
  }

  void logistic_total(const T* bias, bool mean, T* total, const LogisticGradients<T>& result) const {
    const int64_t queries = problem_.query.count;
    const Buffer<T> bias2 = padded(bias, queries, static_cast<T>(kLog2E));
    const T incoming = mean ? T(1) / queries : T(1);
    write_logistic(cpu::logistic_total(problem_, bias2.get(), incoming, wanted_of(result), total), result);
  }

 private:
  // One test of ids each way is what the kernels do fastest.
  void set_rule() {
    rule_ = call_.rule;
    if (!rule_.exclude.ids.empty()) {
      problem_.exclude = rule_.exclude.ids.back();
      rule_.exclude.ids.pop_back();
    }
    if (rule_.positive.ids.size() == 1 && rule_.positive.masks.empty()) {
      problem_.positive = rule_.positive.ids[0];
      rule_.positive.ids.clear();
    }
    const bool more = !rule_.exclude.empty() || !rule_.positive.empty() || !rule_.only.empty() ||
                      rule_.within.row || rule_.excluded_per_query;
    problem_.rule = more ? &rule_ : nullptr;
  }

  Side<T> side(const Input& input, const T* factor, Use use) const {
    const bool as_it_is = use != Use::gradients && bfloat16_kernels() && bfloat16_fits_ && !call_.normalize &&
                          call_.query.dtype == DType::bfloat16 && call_.key.dtype == DType::bfloat16 &&
                          (!key_scale_ || factors_fit());
    if (!as_it_is) return make_side(input, call_.normalize, factor);
    Side<T> side;
    side.rows.count = input.count;
    side.rows.width = input.width;
    return side;
  }

  bool factors_fit() const {
    if constexpr (std::is_same_v<T, float>) return products_fit(key_scale_, call_.key.count);
    return true;
  }

  void set_bfloat16_rows() {
    if (key_scale_ && !factors_fit()) return;
    bfloat16_ = bfloat16_sides({call_.query}, query_.unit, call_.symmetric ? nullptr : &call_.key, &key_.unit,
                               call_.precision);
    for (int64_t j = 0; bfloat16_.problem.parts && key_scale_ && j < call_.key.count; j++)
      bfloat16_.key.factor[j] *= key_scale_[j];
    problem_.bfloat16 = bfloat16_.problem;
  }

  static void write_state(const State<T>& state, int64_t count, T* statistics, T* saved) {
    for_each_range(count, 1024, [&](int64_t begin, int64_t end, Scratch&) {
      for (int64_t i = begin; i < end; i++) {
        const LogSum<T> entries[] = {state.negative(i), state.positive(i)};
        for (int side = 0; side < 2; side++) {
          const T max = *entries[side].max, sum = entries[side].total();
          const bool empty = is_empty(max) && !std::isnan(sum);
          statistics[kLses[side] * count + i] = log_sum_exp(max, sum);
          saved[kMaxima[side] * count + i] = empty ? -INFINITY : max;
          saved[kTotals[side] * count + i] = empty ? T(0) : sum;
        }
        const PositiveSums<T> positives = state.positive_sums(i);
        statistics[StatisticsFields::kPosSum * count + i] = positives.sum.total() * static_cast<T>(kLn2);
        statistics[StatisticsFields::kPosCount * count + i] = *positives.count;
        const T max = *entries[0].max, sum = entries[0].total();
        statistics[StatisticsFields::kMaxNeg * count + i] = std::isnan(sum) ? sum
                                                            : is_empty(max) ? -INFINITY
                                                                            : max * static_cast<T>(kLn2);
      }
    });
  }

  void write_weighted(const Attended<T>& attended, T* out) const {
    const int64_t width = problem_.query.width;
    for_each_range(problem_.query.count, 64, [&](int64_t begin, int64_t end, Scratch&) {
      for (int64_t i = begin; i < end; i++) {
        const LogSum<T> entry = attended.rows.negative(i);
        const T factor = weight_factor(T(1), *entry.max, entry.total());
        for (int64_t d = 0; d < width; d++) out[i * width + d] = attended.query.row(0, i)[d] * factor;
      }
    });
  }

  static SideWeights<T> side_weights(const T* grad, const T* state, int64_t count) {
    using W = SideWeights<T>;
    constexpr int kWeightMaxima[] = {W::kNegMax, W::kPosMax}, kFactors[] = {W::kNegFactor, W::kPosFactor};
    W weights = make_side_weights<T>(count);
    for (int64_t i = 0; i < count; i++) {
      for (int side = 0; side < 2; side++) {
        const T max = state[kMaxima[side] * count + i], sum = state[kTotals[side] * count + i];
        if (max > excluded_logit<T> / 2) weights.field(kWeightMaxima[side])[i] = max;
        weights.field(kFactors[side])[i] = weight_factor(grad[kLses[side] * count + i], max, sum);
      }
      weights.field(W::kConstant)[i] = grad[StatisticsFields::kPosSum * count + i];
    }
    return weights;
  }

  static Wanted wanted_of(const LogisticGradients<T>& result) {
    const bool scale_wanted = result.scale != nullptr;
    return {result.query || scale_wanted, result.key != nullptr, false, scale_wanted, result.bias != nullptr};
  }

  void write_logistic(const PairSums<T>& sums, const LogisticGradients<T>& result) const {
    write_inputs(sums, result.query, result.key, result.scale, nullptr);
    write_bias(sums.query_bias, problem_.query.count, result.bias);
  }

  void write_inputs(const PairSums<T>& sums, T* query, T* key, double* scale, T* key_scale) const {
    if (scale) *scale = sums.scale ? *sums.scale : scale_gradient(sums.query);
    if (query) write_side(query_, sums.query, nullptr, query, nullptr);
    if (key || key_scale) write_side(key_, sums.key, key_scale_, key, key_scale);
  }

  static void write_bias(const Partials<T>& sums, int64_t count, T* out) {
    for (int64_t i = 0; out && i < count; i++) {
      out[i] = 0;
      for (int64_t p = 0; p < sums.parts; p++) out[i] += *sums.row(p, i);
    }
  }

  double scale_gradient(const Partials<T>& sums) const {
    double total = 0;
    for (int64_t i = 0; i < sums.rows; i++)
      for (int64_t p = 0; p < sums.parts; p++)
        total += kernels<T>().dot(problem_.query.row(i), sums.row(p, i), sums.width);
    return problem_.symmetric ? total / 2 : total;
  }

  // `factor` (null: 1) was multiplied into the rows; `grad_factor` is its gradient.
  void write_side(const Side<T>& side, const Partials<T>& partials, const T* factor, T* out,
                  T* grad_factor) const {
    const T scale = static_cast<T>(call_.scale);
    const int64_t width = problem_.query.width;
    auto sum = [&](int64_t i, T* row) { add_parts(partials, i, row); };
    if (side.unit.rows) {
      write_gradients(side.unit, scale, sum, rows_of(out, width), grad_factor, factor);
      for (int64_t i = 0; grad_factor && i < partials.rows; i++) grad_factor[i] *= scale;
      return;
    }
    for_each_range(partials.rows, kRowGrain, [&](int64_t begin, int64_t end, Scratch& scratch) {
      T* row = scratch.take<T>(kQuerySlot, partials.width);
      for (int64_t i = begin; i < end; i++) {
        std::fill_n(row, partials.width, T(0));
        sum(i, row);
        for (int64_t d = 0; d < width; d++) out[i * width + d] = row[d] * scale;
      }
    });
  }

  const SimilarityCall& call_;
  const T* key_scale_;
  const bool bfloat16_fits_;
  Side<T> query_, key_;
  BFloat16Sides bfloat16_;
  PairRule rule_;
  Problem<T> problem_;
};

}  // namespace

template <class T>
void similarity_forward(const SimilarityCall& call, const SimilarityResult<T>& result) {
  Similarity<T>(call, Use::statistics).forward(result);
}
template <class T>
void similarity_topk(const SimilarityCall& call, int64_t k, bool largest, const T* below, T* values,
                     int64_t* indices) {
  Similarity<T>(call, Use::similarities).topk(k, largest, below, values, indices);
}
template <class T>
void similarity_sinkhorn(const SimilarityCall& call, int64_t steps, T* of_keys) {
  Similarity<T>(call, Use::statistics).potentials(steps, of_keys);
}
template <class T>
void similarity_logistic(const SimilarityCall& call, const T* bias, T* sums) {
  Similarity<T>(call, Use::statistics).logistic(bias, sums);
}
template <class T>
void similarity_logistic_backward(const SimilarityCall& call, const T* bias, const T* grad,
                                  const LogisticGradients<T>& result) {
  Similarity<T>(call, Use::gradients).logistic_backward(bias, grad, result);
}
template <class T>
void similarity_logistic_total(const SimilarityCall& call, const T* bias, bool mean, T* total,
                               const LogisticGradients<T>& result) {
  const bool wanted = result.query || result.key || result.scale || result.bias;
  Similarity<T>(call, wanted ? Use::gradients : Use::statistics).logistic_total(bias, mean, total, result);
}
template <class T>
void similarity_backward(const SimilarityCall& call, const SimilaritySaved<T>& saved,
                         const SimilarityGradients<T>& result) {
  Similarity<T>(call, Use::gradients).backward(saved, result);
}

#define FASTCL_INSTANTIATE(T)                                                                     \
  template void similarity_forward<T>(const SimilarityCall&, const SimilarityResult<T>&);         \
  template void similarity_topk<T>(const SimilarityCall&, int64_t, bool, const T*, T*, int64_t*); \
  template void similarity_sinkhorn<T>(const SimilarityCall&, int64_t, T*);                       \
  template void similarity_logistic<T>(const SimilarityCall&, const T*, T*);                      \
  template void similarity_logistic_backward<T>(const SimilarityCall&, const T*, const T*,        \
                                                const LogisticGradients<T>&);                     \
  template void similarity_logistic_total<T>(const SimilarityCall&, const T*, bool, T*,           \
                                             const LogisticGradients<T>&);                        \
  template void similarity_backward<T>(const SimilarityCall&, const SimilaritySaved<T>&,          \
                                       const SimilarityGradients<T>&);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)

}  // namespace fastcl::cpu
