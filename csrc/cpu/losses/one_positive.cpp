#include "cpu/losses/one_positive.h"

#include <numeric>
#include <type_traits>

#include "cpu/losses/attend.h"
#include "cpu/losses/paired.h"
#include "cpu/losses/stats.h"
#include "cpu/run/products.h"
#include "cpu/run/unit_rows.h"

namespace fastcl::cpu {

namespace {

constexpr int64_t kSingleTile = 128;  // rows: above it, threads and symmetry gain more than reuse

template <class T>
class Loss {
 public:
  Loss(const OnePositive& args, const OnePositiveResult<T>& result) : args_(args), result_(result) {
    const bool views = args.layout == Layout::views;
    query_ = views ? unit_rows<T>({args.query, args.positive}, args.normalize)
                   : unit_rows<T>({args.query}, args.normalize);
    rows_ = query_.count;
    incoming_ = args.mean ? T(1) / rows_ : T(1);
    problem_.query = query_.as_rows();
    problem_.scale2 = static_cast<T>(args.scale * kLog2E);
    problem_.bias2 = nullptr;
    problem_.symmetric = views;
    set_keys();
    if (assigned()) set_assigned();
    if constexpr (std::is_same_v<T, float>)
      if (args.scale != 0) set_bfloat16_rows();
    set_excluded();
    pull_ = allocate_filled<T>(rows_, T(0));
    losses_ = allocate_filled<T>(rows_, T(0));
  }

  void run() {
    const bool gradients = result_.query || result_.positive || result_.negatives || result_.scale;
    const bool keys_wanted = key_gradients();
    const bool two_sided = args_.layout == Layout::views || args_.layout == Layout::pairs;
    if (problem_.symmetric && rows_ <= kSingleTile)
      run_single_tile(gradients);
    else if (!gradients || two_sided || (keys_wanted && !weights_fit(problem_)) ||
             (result_.scale && problem_.bfloat16.parts))
      run_two_passes(gradients, keys_wanted);
    else if (keys_wanted)
      run_kept_weights();
    else
      run_frozen_keys();
    const double total = std::accumulate(losses_.get(), losses_.get() + rows_, 0.0);
    *result_.loss = static_cast<T>(args_.mean ? total / rows_ : total);
  }

 private:
  bool assigned() const { return args_.layout == Layout::assigned; }
  bool keys_given() const { return args_.layout == Layout::negatives || assigned(); }
  T* key_gradients() const { return keys_given() ? result_.negatives : result_.positive; }

  void set_keys() {
    if (args_.layout == Layout::views) {
      problem_.key = problem_.query;
      return;
    }
    if (!assigned()) positive_ = unit_rows<T>({args_.positive}, args_.normalize);
    if (!keys_given()) {
      problem_.key = positive_.as_rows();
    } else if (args_.normalize_negatives && rows_ > kMaxBlock) {  // each is read often
      negatives_ = unit_rows<T>({args_.negatives}, true);
      problem_.key = negatives_.as_rows();
    } else {
      negatives_ = inverse_norms<T>(args_.negatives, args_.normalize_negatives);
      problem_.key = key_rows<T>(args_.negatives, negatives_.inverse.get());
    }
  }

  // The positives are rows of the keys; which queries have which.
  void set_assigned() {
    const int64_t keys = negatives_.count;
    positive_.count = rows_;
    positive_.width = query_.width;
    positive_.stride = query_.stride;
    positive_.rows = allocate<T>(rows_ * positive_.stride);
    first_assigned_ = allocate_filled<int64_t>(keys + 1, 0);
    assigned_ = allocate<int64_t>(rows_);
    Scratch scratch;
    for (int64_t i = 0; i < rows_; i++) {
      const int64_t key = args_.query_ids[i];
      if (key < 0 || key >= keys) throw std::out_of_range("assigned names a row that is not there");
      int64_t stride;
      std::copy_n(problem_.key.tile(key, 1, kKeySlot, scratch, &stride), positive_.stride, positive_.row(i));
      first_assigned_[key + 1]++;
    }
    std::partial_sum(first_assigned_.get(), first_assigned_.get() + keys + 1, first_assigned_.get());
    Buffer<int64_t> next = allocate<int64_t>(keys);
    std::copy_n(first_assigned_.get(), keys, next.get());
    for (int64_t i = 0; i < rows_; i++) assigned_[next[args_.query_ids[i]]++] = i;
  }

  void set_excluded() {
    if (args_.layout == Layout::negatives) {
      problem_.exclude = {args_.query_ids ? args_.negative_ids : nullptr, args_.query_ids};
      return;
    }
    const int64_t count = assigned() ? negatives_.count : rows_;
    ids_ = allocate<int64_t>(count);
    for (int64_t i = 0; i < count; i++) ids_[i] = assigned() ? i : i % args_.query.count;
    problem_.exclude = {ids_.get(), assigned() ? args_.query_ids : ids_.get()};
  }

  void set_bfloat16_rows() {
    if (args_.layout == Layout::views) {
      if (rows_ > kSingleTile)
        bfloat16_ = bfloat16_sides({args_.query, args_.positive}, query_, nullptr, nullptr, args_.precision);
    } else if (keys_given()) {
      bfloat16_ = bfloat16_sides({args_.query}, query_, &args_.negatives,
                                 args_.normalize_negatives ? &negatives_ : nullptr, args_.precision);
    } else {
      bfloat16_ = bfloat16_sides({args_.query}, query_, &args_.positive, &positive_, args_.precision);
    }
    problem_.bfloat16 = bfloat16_.problem;
  }

  const T* positive_row(int64_t i) const {
    return args_.layout == Layout::views ? query_.row((i + rows_ / 2) % rows_) : positive_.row(i);
  }

  // Adds one direction's loss of row i, weighted, and returns the gradient of its lse_neg.
  T add_loss(int64_t i, T max, T sum, T weight) {
    const T similarity = kernels<T>().dot(query_.row(i), positive_row(i), query_.stride);
    const SoftPlus<T> loss = loss_of_row<T>(args_, log_sum_exp(max, sum, problem_.scale2 * similarity));
    losses_[i] += weight * loss.value;
    const T gradient = loss.slope * weight * incoming_;
    pull_[i] += gradient;
    return gradient;
  }

  // Losses of all rows from a state; their weights for the backward pass.
  SideWeights<T> weigh(const State<T>& state, T weight) {
    SideWeights<T> weights = make_side_weights<T>(rows_);
    for_each_range(rows_, kRowGrain, [&](int64_t begin, int64_t end, Scratch&) {
      for (int64_t i = begin; i < end; i++) {
        const LogSum<T> entry = state.negative(i);
        weights.field(SideWeights<T>::kNegMax)[i] = *entry.max;
        const T sum = entry.total();
        weights.field(SideWeights<T>::kNegFactor)[i] =
            weight_factor(add_loss(i, *entry.max, sum, weight), *entry.max, sum);
      }
    });
    return weights;
  }

  // A small batch of views: one tile, whose similarities serve both passes.
  void run_single_tile(bool gradients) {
    const Kernels<T>& k = kernels<T>();
    const int64_t block = round_up(rows_, kLaneUnit);
    const Buffer<T> similarities = allocate<T>(rows_ * block);
    const Tile<T> tile{similarities.get(), block, rows_, rows_};
    Scratch scratch;
    const auto products = make_products(problem_, rows_, block, scratch);
    products->set_lanes(0, rows_);
    products->set_rows(0, rows_);
    products->logits(tile);
    k.exclude(tile, problem_.exclude);
    const State<T> state = make_state<T>(rows_);
    k.lane_log_sum(tile, state.negative(0));
    const SideWeights<T> weights = weigh(state, T(1));
    if (!gradients) return;
    k.both_weights(tile, weights.negative(0), weights.negative(0));
    const Buffer<T> sums = allocate_filled<T>(rows_ * query_.stride, T(0));
    products->add_to_lanes(tile, sums.get());
    finish([&](int64_t i, T* sum) { std::copy_n(sums.get() + i * query_.stride, query_.stride, sum); });
  }

  void run_two_passes(bool gradients, bool keys_wanted) {
    const bool columns = args_.layout == Layout::pairs;
    const KeptTiles<T> kept = gradients ? make_kept_tiles(problem_) : KeptTiles<T>{};
    const Statistics<T> stats = statistics(problem_, columns, kept);
    const SideWeights<T> row_weights = weigh(stats.rows, columns ? T(0.5) : T(1));
    const SideWeights<T> column_weights = columns ? weigh(stats.columns, T(0.5)) : SideWeights<T>{};
    if (!gradients) return;
    const bool query_wanted = problem_.symmetric || result_.query || result_.scale;
    const PairSums<T> sums =
        pair_sums(problem_, row_weights, column_weights,
                  {query_wanted, keys_wanted && !problem_.symmetric, false, result_.scale != nullptr}, kept);
    finish([&](int64_t i, T* sum) { add_parts(sums.query, i, sum); });
    for_each_sum(sums.key, [&](int64_t begin, int64_t count, T* range, Scratch& scratch) {
      write_keys(begin, count, range, scratch);
    });
    if (sums.scale) *result_.scale = *sums.scale - positives_pull();
  }

  // The positives' part of the gradient of the scale, negated.
  double positives_pull() const {
    double total = 0;
    for (int64_t i = 0; i < rows_; i++)
      total +=
          static_cast<double>(pull_[i]) * kernels<T>().dot(query_.row(i), positive_row(i), query_.stride);
    return total;
  }

  void run_kept_weights() {
    auto factor = [&](int64_t i, T max, T sum) {
      return weight_factor(add_loss(i, max, sum, T(1)), max, sum);
    };
    auto emit = [&](int64_t begin, int64_t count, T* sums, Scratch& scratch) {
      write_keys(begin, count, sums, scratch);
    };
    finish_attended(attend_with_keys<T>(problem_, factor, emit));
  }

  void run_frozen_keys() {
    const Attended<T> attended = attend(problem_);
    weigh(attended.rows, T(1));
    finish_attended(attended);
  }

  void finish_attended(const Attended<T>& attended) {
    auto query_sum = [&](int64_t i, T* sum) {
      const LogSum<T> entry = attended.rows.negative(i);
      kernels<T>().add_scaled(sum, attended.query.row(0, i),
                              weight_factor(pull_[i], *entry.max, entry.total()), query_.stride);
    };
    finish(query_sum);
  }

  // The gradients of all but the keys.
  template <class QuerySum>
  void finish(const QuerySum& query_sum) {
    const Kernels<T>& k = kernels<T>();
    const int64_t width = query_.width, n = args_.query.count;
    const bool views = args_.layout == Layout::views;
    const T scale = static_cast<T>(args_.scale);
    Buffer<T> radial = result_.scale ? allocate<T>(rows_) : nullptr;
    auto query_out = [&](int64_t i) {
      T* out = i < n ? result_.query : result_.positive;
      return out ? out + i % n * width : nullptr;
    };
    auto query_row = [&](int64_t i, T* sum) {
      query_sum(i, sum);
      // as a view, the row is also the positive of its positive
      const T pull = views ? pull_[i] + pull_[(i + n) % rows_] : pull_[i];
      k.add_scaled(sum, positive_row(i), -pull, query_.stride);
    };
    write_gradients(query_, scale, query_row, query_out, radial.get());
    if (result_.scale) {
      const double total = std::accumulate(radial.get(), radial.get() + rows_, 0.0);
      *result_.scale = views ? total / 2 : total;
    }
    if (args_.layout != Layout::negatives || !result_.positive) return;
    auto pulled = [&](int64_t i, T* sum) { k.add_scaled(sum, query_.row(i), -pull_[i], query_.stride); };
    write_gradients<T>(positive_, scale, pulled, rows_of(result_.positive, width), nullptr);
  }

  // The gradients of `count` keys, which may be positives, from their sums as negatives, which it changes.
  void write_keys(int64_t begin, int64_t count, T* sums, Scratch& scratch) {
    const T* const inverse = keys_given() ? negatives_.inverse.get() : positive_.inverse.get();
    const int64_t stride = query_.stride;
    for (int64_t i = begin; i < begin + count; i++) {
      T* const sum = sums + (i - begin) * stride;
      if (assigned()) {
        pull_assigned(i, sum);
      } else if (!keys_given()) {
        kernels<T>().add_scaled(sum, query_.row(i), -pull_[i], stride);
      }
    }
    write_key_gradients(problem_.key, inverse, static_cast<T>(args_.scale), begin, count, sums, stride,
                        key_gradients(), scratch);
  }

  // Adds the queries whose positive is key i, in blocks: the error does not grow with their number.
  void pull_assigned(int64_t i, T* sum) const {
    constexpr int64_t kPulled = 64;
    const int64_t begin = first_assigned_[i], end = first_assigned_[i + 1];
    const Buffer<T> block = end - begin > kPulled ? allocate<T>(query_.stride) : nullptr;
    T* const to = block ? block.get() : sum;
    for (int64_t first = begin; first < end; first += kPulled) {
      if (block) std::fill_n(to, query_.stride, T(0));
      for (int64_t k = first; k < std::min(first + kPulled, end); k++)
        kernels<T>().add_scaled(to, query_.row(assigned_[k]), -pull_[assigned_[k]], query_.stride);
      if (block) kernels<T>().add_scaled(sum, to, T(1), query_.stride);
    }
  }

  const OnePositive& args_;
  const OnePositiveResult<T>& result_;
  UnitRows<T> query_, positive_, negatives_;
  BFloat16Sides bfloat16_;
  Problem<T> problem_;
  Buffer<int64_t> ids_;
  Buffer<int64_t> first_assigned_, assigned_;  // queries by their positive, and where each key's begin
  int64_t rows_;
  T incoming_;
  Buffer<T> pull_;  // minus the gradient of the positive's logit
  Buffer<T> losses_;
};

}  // namespace

template <class T>
void one_positive(const OnePositive& args, const OnePositiveResult<T>& result) {
  if (args.layout == Layout::paired) return paired(args, result);
  Loss<T>(args, result).run();
}

template void one_positive<float>(const OnePositive&, const OnePositiveResult<float>&);
template void one_positive<double>(const OnePositive&, const OnePositiveResult<double>&);

}  // namespace fastcl::cpu
