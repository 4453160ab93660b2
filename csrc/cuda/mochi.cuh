// MoCHi's synthetic negatives, loss and gradients, a block per query, in one launch. No synthetic negative is
// formed: its logit follows from similarities and products of hard keys, its part of the gradient from
// weights on them. Each warp adds up weights of its own, so that sums have a fixed order.
#pragma once

#include "cuda/loss_lines.cuh"
#include "cuda/mochi.h"

namespace fastcl::cuda {
inline namespace FASTCL_BODY {

template <class T, class Key>
class MixingKernel {
 public:
  FASTCL_TILE MixingKernel(const Block& block, const Mixing<T, Key>& args)
      : block_(block), args_(args), floats_(args.floats()), unit_(reinterpret_cast<float*>(block.shared())) {}

  FASTCL_TILE void run() {
    const int blocks = block_.grid_warps() / kWarps;
    for (int64_t row = block_.index(); row < args_.rows; row += blocks) {
      const T *query = args_.query + row * args_.query_stride,
              *positive = args_.positive + row * args_.positive_stride;
      hard_ = args_.hard + row * args_.n_hard;
      const float query_norm = norm(block_, query, args_.width), query_inverse = inverse_norm(query_norm),
                  positive_inverse = inverse_norm(norm(block_, positive, args_.width));
      block_.each(args_.width, [&](int d) { unit_[d] = static_cast<float>(query[d]) * query_inverse; });
      block_.barrier();
      measure_hard_keys();
      block_.barrier();
      mix(row, query_norm * query_inverse);
      block_.barrier();
      const LogSum all = join_queue(row);
      const float cosine = positive_inverse * block_.warp_sum(args_.width, [&](int d) {
        return unit_[d] * static_cast<float>(positive[d]);
      });
      const float excess = (all.max - *args_.scale * kLog2E * cosine + log2f(all.sum)) * kLn2;
      const float slope = 1 / (1 + expf(-excess));
      if (block_.warp() == 0 && block_.leader()) args_.loss[row] = softplus(excess);
      weigh_hard_keys(row, all);
      block_.barrier();
      if (block_.warp() == 0) finish_query(row, all, slope, positive, positive_inverse, query_inverse);
      if (block_.warp() == 1) finish_positive(row, slope, positive, positive_inverse);
      block_.barrier();
    }
  }

 private:
  // What is not finite ranks among the hard keys as none.
  FASTCL_TILE const Key* hard_key(int rank) const {
    const int64_t key = hard_[rank];
    return args_.keys + (key < 0 ? 0 : key) * args_.width;
  }
  template <class Value>
  FASTCL_TILE float product(const Key* key, const Value& value) const {
    return block_.warp_sum(args_.width, [&](int d) { return static_cast<float>(key[d]) * value(d); });
  }
  FASTCL_TILE float* at(int64_t offset) const { return unit_ + offset; }
  FASTCL_TILE float* weights_of(int warp) const { return at(floats_.weight) + int64_t(warp) * args_.n_hard; }
  FASTCL_TILE float* pull_of(int warp) const { return at(floats_.pull) + int64_t(warp) * args_.width; }

  FASTCL_TILE void measure_hard_keys() const {
    for (int rank = block_.warp(); rank < args_.n_hard; rank += kWarps) {
      const Key* key = hard_key(rank);
      const float squared = product(key, [&](int d) { return static_cast<float>(key[d]); }),
                  similarity = product(key, [&](int d) { return unit_[d]; });
      if (block_.leader()) {
        at(floats_.squared)[rank] = squared;
        at(floats_.similarity)[rank] = similarity;
      }
    }
  }

  // Logits of the synthetic negatives: first those of two hard keys, then those with the query.
  FASTCL_TILE void mix(int64_t row, float query_length) const {
    const int64_t *first = args_.first + row * args_.n_mix, *second = args_.second + row * args_.n_mix,
                  *partner = args_.partner + row * args_.n_query_mix;
    const float *squared = at(floats_.squared), *similarity = at(floats_.similarity),
                *alpha = args_.alpha + row * args_.n_mix, *beta = args_.beta + row * args_.n_query_mix;
    for (int h = block_.warp(); h < args_.n_mix; h += kWarps) {
      const int64_t a = first[h], b = second[h];
      const Key* other = hard_key(b);
      const float both = product(hard_key(a), [&](int d) { return static_cast<float>(other[d]); });
      if (block_.leader()) set(h, alpha[h], similarity[a], squared[a], similarity[b], squared[b], both);
    }
    const float query_squared = query_length * query_length;
    block_.each(args_.n_query_mix, [&](int h) {
      const int64_t b = partner[h];
      set(args_.n_mix + h, beta[h], query_squared, query_squared, similarity[b], squared[b], similarity[b]);
    });
  }
  // The mix w u + (1 - w) v, given the similarities of u and v to the query, their squares and product.
  FASTCL_TILE void set(int h, float w, float u, float u_squared, float v, float v_squared,
                       float product) const {
    const float squared = w * w * u_squared + (1 - w) * (1 - w) * v_squared + 2 * w * (1 - w) * product;
    const float inverse = squared <= 0 ? 0 : 1 / sqrtf(squared);
    at(floats_.inverse)[h] = inverse;
    at(floats_.logit)[h] = *args_.scale * kLog2E * (w * u + (1 - w) * v) * inverse;
  }

  FASTCL_TILE LogSum join_queue(int64_t row) const {
    const LogSum mixed = log_sum(block_, args_.synthetics(), [&](int h) { return at(floats_.logit)[h]; });
    const LogSum both[] = {{fmaxf(args_.queue_max[row], kEmptyMax), args_.queue_sum[row]}, mixed};
    return merged_log_sum(2, [&](int i) { return both[i]; });
  }

  // Weights in units of exp2(max), then the warps' parts of the hard keys' weighted sum.
  FASTCL_TILE void weigh_hard_keys(int64_t row, LogSum all) const {
    float* own = weights_of(block_.warp());
    block_.warp_each(args_.n_hard, [&](int rank) { own[rank] = 0; });
    block_.barrier();
    if (block_.leader()) scatter(row, all.max, own);
    block_.barrier();
    float* total = weights_of(0);
    block_.each(args_.n_hard, [&](int rank) {
      for (int warp = 1; warp < kWarps; warp++) total[rank] += weights_of(warp)[rank];
    });
    block_.barrier();
    float* pull = pull_of(block_.warp());
    block_.warp_each(args_.width, [&](int d) {
      float sum = 0;
      for (int rank = block_.warp(); rank < args_.n_hard; rank += kWarps)
        sum += total[rank] * static_cast<float>(hard_key(rank)[d]);
      pull[d] = sum;
    });
  }
  FASTCL_TILE void scatter(int64_t row, float max, float* weights) const {
    const int64_t *first = args_.first + row * args_.n_mix, *second = args_.second + row * args_.n_mix,
                  *partner = args_.partner + row * args_.n_query_mix;
    const float *alpha = args_.alpha + row * args_.n_mix, *beta = args_.beta + row * args_.n_query_mix;
    const float *logit = at(floats_.logit), *inverse = at(floats_.inverse);
    float on_query = 0;
    for (int h = block_.warp(); h < args_.n_mix; h += kWarps) {
      const float weight = exp2f(logit[h] - max) * inverse[h];
      weights[first[h]] += weight * alpha[h];
      weights[second[h]] += weight * (1 - alpha[h]);
    }
    for (int h = block_.warp(); h < args_.n_query_mix; h += kWarps) {
      const float weight = exp2f(logit[args_.n_mix + h] - max) * inverse[args_.n_mix + h];
      weights[partner[h]] += weight * (1 - beta[h]);
      on_query += weight * beta[h];
    }
    at(floats_.on_query)[block_.warp()] = on_query;
  }

  FASTCL_TILE void finish_query(int64_t row, LogSum all, float slope, const T* positive,
                                float positive_inverse, float query_inverse) const {
    const float factor = slope / all.sum, on_queue = factor * args_.queue_sum[row] *
                                                     exp2f(fmaxf(args_.queue_max[row], kEmptyMax) - all.max);
    const float* queue_mean = args_.queue_mean + row * args_.width;
    float on_query = 0;
    for (int warp = 0; warp < kWarps; warp++) on_query += at(floats_.on_query)[warp];
    float* along = pull_of(0);
    const float radial = block_.warp_sum(args_.width, [&](int d) {
      float sum = on_query * unit_[d];
      for (int warp = 0; warp < kWarps; warp++) sum += pull_of(warp)[d];
      sum = factor * sum + on_queue * queue_mean[d] -
            slope * positive_inverse * static_cast<float>(positive[d]);
      along[d] = sum;
      return sum * unit_[d];
    });
    if (block_.leader()) args_.grad_scale[row] = radial;
    write_gradient(
        args_.grad_query + row * args_.width, [&](int d) { return along[d]; },
        [&](int d) { return unit_[d]; }, radial, *args_.scale, query_inverse);
  }
  FASTCL_TILE void finish_positive(int64_t row, float slope, const T* positive,
                                   float positive_inverse) const {
    auto unit = [&](int d) { return static_cast<float>(positive[d]) * positive_inverse; };
    const float radial = block_.warp_sum(args_.width, [&](int d) { return unit_[d] * unit(d); });
    write_gradient(
        args_.grad_positive + row * args_.width, [&](int d) { return unit_[d]; }, unit, radial,
        -*args_.scale * slope, positive_inverse);
  }
  // The way back through the norm of `along`'s gradient by the unit row, times factor.
  template <class Along, class Unit>
  FASTCL_TILE void write_gradient(float* to, const Along& along, const Unit& unit, float radial, float factor,
                                  float inverse) const {
    const float projected = inverse < kLargestInverse ? radial : 0;
    block_.warp_each(args_.width,
                     [&](int d) { to[d] = (along(d) - unit(d) * projected) * factor * inverse; });
  }

  const Block& block_;
  const Mixing<T, Key>& args_;
  const MixingFloats floats_;
  float* const unit_;    // (width) the query's, where shared memory begins
  const int64_t* hard_;  // (n_hard) of the query
};

}  // namespace FASTCL_BODY
}  // namespace fastcl::cuda
