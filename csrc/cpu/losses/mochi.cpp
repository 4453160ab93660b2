#include "cpu/losses/mochi.h"

#include "cpu/losses/attend.h"
#include "cpu/losses/topk.h"

namespace fastcl::cpu {

namespace {

// One query's synthetic negatives. None of them is formed: their logits follow from the hard keys'
// similarities, and their part of the gradient from weights on the hard keys.
template <class T>
class Mixer {
 public:
  Mixer(const Mochi<T>& args, const Rows<T>& keys, int64_t stride, Scratch& scratch)
      : args_(args), keys_(keys), stride_(stride), count_(args.n_mix + args.n_query_mix) {
    hard_ = scratch.take<T>(kKeySlot, args.n_hard * stride);
    weight_ = scratch.take<T>(kSumSlot, 2 * args.n_hard + 2 * count_);
    squared_ = weight_ + args.n_hard;
    logit_ = squared_ + args.n_hard;
    inverse_ = logit_ + count_;
    drawn_ = scratch.take<int64_t>(kPackedSlot, args.n_hard + 1);
    mix_ = scratch.take<T>(kLaneSlot, stride);
  }

  // Log-sum-exp of the synthetic logits of query i, merged into (max, sum).
  void add(int64_t i, const T* query, const T* similarity, const int64_t* index, T scale2, T* max, T* sum) {
    first_ = args_.first + i * args_.n_mix;
    second_ = args_.second + i * args_.n_mix;
    alpha_ = args_.alpha + i * args_.n_mix;
    partner_ = args_.partner + i * args_.n_query_mix;
    beta_ = args_.beta + i * args_.n_query_mix;
    find_drawn();
    for (int64_t n = 0; n < drawn_count_; n++) {
      if (n + kAhead < drawn_count_) prefetch(index[drawn_[n + kAhead]]);
      const int64_t r = drawn_[n];
      k_.load_rows(hard_ + r * stride_, stride_, keys_.source(index[r]), keys_.dtype, keys_.stride, 1,
                   keys_.width, nullptr);
      squared_[r] = k_.dot(hard_ + r * stride_, hard_ + r * stride_, stride_);
    }
    const T query_squared = k_.dot(query, query, stride_);
    const Part own{query, query_squared, query_squared};
    auto hard = [&](int64_t r) { return Part{hard_ + r * stride_, similarity[r], squared_[r]}; };
    for (int64_t h = 0; h < args_.n_mix; h++) {
      const Part a = hard(first_[h]), b = hard(second_[h]);
      set(h, alpha_[h], a, b, k_.dot(a.row, b.row, stride_), query, scale2);
    }
    for (int64_t h = 0; h < args_.n_query_mix; h++) {
      const Part b = hard(partner_[h]);
      set(args_.n_mix + h, beta_[h], own, b, b.similarity, query, scale2);
    }
    T highest = *max;
    for (int64_t h = 0; h < count_; h++) highest = logit_[h] > highest ? logit_[h] : highest;
    *sum *= std::exp2(*max - highest);
    for (int64_t h = 0; h < count_; h++) *sum += std::exp2(logit_[h] - highest);
    *max = highest;
  }

  // out += sum_h exp2(logit_h - max) h, for the query of the last add().
  void add_weighted(const T* query, T max, T* out) {
    std::fill_n(weight_, args_.n_hard, T(0));
    for (int64_t h = 0; h < args_.n_mix; h++) {
      const T w = std::exp2(logit_[h] - max) * inverse_[h];
      weight_[first_[h]] += w * alpha_[h];
      weight_[second_[h]] += w * (1 - alpha_[h]);
    }
    T on_query = 0;
    for (int64_t h = 0; h < args_.n_query_mix; h++) {
      const T w = std::exp2(logit_[args_.n_mix + h] - max) * inverse_[args_.n_mix + h];
      on_query += w * beta_[h];
      weight_[partner_[h]] += w * (1 - beta_[h]);
    }
    for (int64_t n = 0; n < drawn_count_; n++)
      k_.add_scaled(out, hard_ + drawn_[n] * stride_, weight_[drawn_[n]], stride_);
    k_.add_scaled(out, query, on_query, stride_);
  }

 private:
  static constexpr int64_t kAhead = 6, kCacheLine = 64;

  // The ranks that some mix uses.
  void find_drawn() {
    std::fill_n(weight_, args_.n_hard, T(0));
    for (int64_t h = 0; h < args_.n_mix; h++) weight_[first_[h]] = weight_[second_[h]] = 1;
    for (int64_t h = 0; h < args_.n_query_mix; h++) weight_[partner_[h]] = 1;
    drawn_count_ = 0;
    for (int64_t r = 0; r < args_.n_hard; r++) {
      drawn_[drawn_count_] = r;
      drawn_count_ += weight_[r] != 0;
    }
  }

  // The hard keys lie anywhere in the queue.
  void prefetch(int64_t key) const {
    const char *row = static_cast<const char*>(keys_.source(key)),
               *end = static_cast<const char*>(keys_.source(key)) + keys_.row_bytes();
    for (; row < end; row += kCacheLine) __builtin_prefetch(row);
  }

  // What is mixed: a row, its similarity to the query, its squared norm.
  struct Part {
    const T* row;
    T similarity, squared;
  };

  // The mix w u + (1 - w) v, from u's and v's product; formed only where nearly opposite rows cancel.
  void set(int64_t h, T w, const Part& u, const Part& v, T product, const T* query, T scale2) {
    const T parts = w * w * u.squared + (1 - w) * (1 - w) * v.squared;
    T squared = parts + 2 * w * (1 - w) * product;
    T similarity = w * u.similarity + (1 - w) * v.similarity;
    if (squared < parts / 8) {
      for (int64_t d = 0; d < stride_; d++) mix_[d] = w * u.row[d] + (1 - w) * v.row[d];
      squared = k_.dot(mix_, mix_, stride_);
      similarity = k_.dot(query, mix_, stride_);
    }
    const T norm = std::sqrt(squared);
    inverse_[h] = norm == 0 ? T(0) : 1 / std::max(norm, T(1e-12));
    logit_[h] = scale2 * similarity * inverse_[h];
  }

  const Kernels<T>& k_ = kernels<T>();
  const Mochi<T>& args_;
  const Rows<T>& keys_;
  const int64_t stride_, count_;
  const int64_t *first_, *second_, *partner_;
  const T *alpha_, *beta_;
  T *hard_, *weight_, *squared_, *logit_, *inverse_, *mix_;
  int64_t* drawn_;
  int64_t drawn_count_;
};

}  // namespace

template <class T>
void mochi(const Mochi<T>& args, const MochiResult<T>& result) {
  const Kernels<T>& k = kernels<T>();
  const UnitRows<T> query = unit_rows<T>({args.query}, true), positive = unit_rows<T>({args.positive}, true);
  const int64_t n = query.count, stride = query.stride, width = query.width;
  Problem<T> problem;
  problem.query = query.as_rows();
  problem.key = key_rows<T>(args.keys);
  problem.scale2 = static_cast<T>(args.scale * kLog2E);
  const Buffer<T> similarity = allocate<T>(n * args.n_hard);
  const Buffer<int64_t> index = allocate<int64_t>(n * args.n_hard);
  const int64_t parts = parts_of_keys(n, args.keys.count);
  const bool ordered = problem.scale2 > 0;  // logits and similarities rank alike: one pass finds both
  Selector<T> selector(problem, args.n_hard, parts, ordered);
  const Attended<T> attended = attend(problem, ordered ? &selector : nullptr);
  if (ordered && selector.complete()) {
    selector.write(problem.scale2, similarity.get(), index.get());
  } else {
    Problem<T> similarities = problem;
    similarities.scale2 = 1;
    topk(similarities, args.n_hard, similarity.get(), index.get());
  }

  for_each_range(n, 8, [&](int64_t begin, int64_t end, Scratch& scratch) {
    Mixer<T> mixer(args, problem.key, stride, scratch);
    T* sum = scratch.take<T>(kQuerySlot, stride);
    for (int64_t i = begin; i < end; i++) {
      const LogSum<T> queue = attended.rows.negative(i);
      T max = *queue.max, total = queue.total();
      mixer.add(i, query.row(i), similarity.get() + i * args.n_hard, index.get() + i * args.n_hard,
                problem.scale2, &max, &total);
      const T positive_logit2 = problem.scale2 * k.dot(query.row(i), positive.row(i), stride);
      const SoftPlus<T> loss = softplus(log_sum_exp(max, total, positive_logit2));
      result.loss[i] = loss.value;
      if (result.query || result.scale) {
        std::fill_n(sum, stride, T(0));
        k.add_scaled(sum, attended.query.row(0, i), std::exp2(*queue.max - max), stride);
        mixer.add_weighted(query.row(i), max, sum);
        const T factor = weight_factor(loss.slope, max, total);
        for (int64_t d = 0; d < stride; d++) sum[d] = sum[d] * factor - loss.slope * positive.row(i)[d];
        T* const out = result.query ? result.query + i * width : sum;
        const T radial = input_gradient(query, i, static_cast<T>(args.scale), sum, out);
        if (result.scale) result.scale[i] = radial;
      }
      if (result.positive) {
        for (int64_t d = 0; d < stride; d++) sum[d] = -loss.slope * query.row(i)[d];
        input_gradient(positive, i, static_cast<T>(args.scale), sum, result.positive + i * width);
      }
    }
  });
}

template void mochi<float>(const Mochi<float>&, const MochiResult<float>&);
template void mochi<double>(const Mochi<double>&, const MochiResult<double>&);

}  // namespace fastcl::cpu
