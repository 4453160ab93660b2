#include "cpu/losses/sup_con.h"

#include <numeric>
#include <type_traits>

#include "cpu/losses/stats.h"

namespace fastcl::cpu {

namespace {

// A row's loss, and its gradients through lse_neg, lse_pos and each positive's logit.
template <class T>
struct RowLoss {
  T value = 0, negative = 0, positive = 0, constant = 0;
};

// From max and sum of the negatives and the positives, of which there are `count`. Differences of logits are
// taken before anything is added to them: logits may be large.
template <class T>
RowLoss<T> loss_of_row(bool log_of_mean, T negative_max, T negative_sum, T positive_max, T positive_sum,
                       T mean_positive2, T count) {
  constexpr T ln2 = static_cast<T>(kLn2);
  if (count == 0) return {};
  const T positives = std::log2(positive_sum);
  const SoftPlus<T> miss =  // -log of the positives' share
      softplus(log_sum_exp(negative_max, negative_sum, positive_max) - positives * ln2);
  if (log_of_mean) return {miss.value + std::log(count), miss.slope, -miss.slope, 0};
  return {miss.value + ((positive_max - mean_positive2) + positives) * ln2, miss.slope, 1 - miss.slope,
          -1 / count};
}

template <class T>
class SupConLoss {
 public:
  SupConLoss(const SupCon& args, const SupConResult<T>& result)
      : args_(args), result_(result), query_(unit_rows<T>({args.query}, args.normalize)) {
    if (!args.own_keys()) key_ = unit_rows<T>({args.key}, args.normalize);
    problem_.query = query_.as_rows();
    problem_.key = args.own_keys() ? problem_.query : key_.as_rows();
    problem_.scale2 = static_cast<T>(args.scale * kLog2E);
    problem_.symmetric = args.own_keys() && (!args.positive.data || is_symmetric(args.positive));
    if constexpr (std::is_same_v<T, float>)
      if (args.scale != 0)
        bfloat16_ = bfloat16_sides({args.query}, query_, args.own_keys() ? nullptr : &args.key, &key_,
                                   args.precision);
    problem_.bfloat16 = bfloat16_.problem;
    ids_ = allocate<int64_t>(problem_.key.count);
    std::iota(ids_.get(), ids_.get() + problem_.key.count, int64_t{0});
    problem_.exclude = {ids_.get(), ids_.get()};
    if (args.positive.data) {
      rule_.positive.masks = {args.positive};
      problem_.rule = &rule_;
    } else {
      problem_.positive = {args.own_keys() ? args.query_labels : args.key_labels, args.query_labels};
    }
  }

  void run() {
    const int64_t rows = query_.count;
    const bool query_wanted = result_.query || result_.scale, gradients = query_wanted || result_.key;
    const KeptTiles<T> kept = gradients ? make_kept_tiles(problem_) : KeptTiles<T>{};
    const SideWeights<T> weights = weigh(statistics(problem_, false, kept).rows);
    if (!gradients) return;
    // a row is also a key, whose gradient a symmetric problem's sums hold already
    const bool both_roles = query_wanted && args_.own_keys() && !problem_.symmetric;
    const PairSums<T> sums =
        pair_sums(problem_, weights, {},
                  {query_wanted, result_.key || both_roles, false, result_.scale != nullptr}, kept);
    const T scale = static_cast<T>(args_.scale);
    if (query_wanted) {
      const Buffer<T> radial = allocate<T>(rows);
      auto sum_of_row = [&](int64_t i, T* sum) {
        add_parts(sums.query, i, sum);
        if (both_roles) add_parts(sums.key, i, sum);
      };
      write_gradients(query_, scale, sum_of_row, rows_of(result_.query, query_.width), radial.get());
      const double total = std::accumulate(radial.get(), radial.get() + rows, 0.0);
      if (result_.scale) *result_.scale = sums.scale.value_or(args_.own_keys() ? total / 2 : total);
    }
    if (!result_.key) return;
    auto sum_of_key = [&](int64_t i, T* sum) { add_parts(sums.key, i, sum); };
    write_gradients<T>(key_, scale, sum_of_key, rows_of(result_.key, key_.width), nullptr);
  }

 private:
  // Writes the loss; returns the weights of the pairs in the backward pass.
  SideWeights<T> weigh(const State<T>& state) {
    using W = SideWeights<T>;
    const int64_t rows = query_.count;
    const T incoming = args_.mean ? T(1) / rows : T(1);
    W weights = make_side_weights<T>(rows);
    double total = 0;
    for (int64_t i = 0; i < rows; i++) {
      const LogSum<T> negative = state.negative(i), positive = state.positive(i);
      const T negative_sum = negative.total(), positive_sum = positive.total();
      const PositiveSums<T> positives = state.positive_sums(i);
      const T count = *positives.count;
      const RowLoss<T> loss = loss_of_row(args_.log_of_mean, *negative.max, negative_sum, *positive.max,
                                          positive_sum, positives.sum.total() / count, count);
      total += loss.value;
      weights.field(W::kNegMax)[i] = *negative.max;
      weights.field(W::kNegFactor)[i] = weight_factor(loss.negative * incoming, *negative.max, negative_sum);
      weights.field(W::kPosMax)[i] = *positive.max;
      weights.field(W::kPosFactor)[i] = weight_factor(loss.positive * incoming, *positive.max, positive_sum);
      weights.field(W::kConstant)[i] = loss.constant * incoming;
    }
    *result_.loss = static_cast<T>(args_.mean ? total / rows : total);
    return weights;
  }

  const SupCon& args_;
  const SupConResult<T>& result_;
  UnitRows<T> query_, key_;
  BFloat16Sides bfloat16_;
  PairRule rule_;
  Problem<T> problem_;
  Buffer<int64_t> ids_;
};

}  // namespace

template <class T>
void sup_con(const SupCon& args, const SupConResult<T>& result) {
  SupConLoss<T>(args, result).run();
}

template void sup_con<float>(const SupCon&, const SupConResult<float>&);
template void sup_con<double>(const SupCon&, const SupConResult<double>&);

}  // namespace fastcl::cpu
