// Softplus and its derivative over the pairs of a tile, in log2 units.
#pragma once

#include "cpu/simd/log_sum.h"

namespace fastcl::cpu {
namespace {

// log2(1 + t) for 0 <= t <= 1, with the relative accuracy of t: the series of the inverse hyperbolic tangent.
template <class T>
Vec<T> log2_of_1_plus(Vec<T> t) {
  constexpr int kTerms = sizeof(T) == 4 ? 7 : 15;  // each at most a ninth of the one before
  constexpr T kTwoLog2E = T(2 * 1.4426950408889634074);
  const Vec<T> s = t / (t + T(2)), square = s * s;
  Vec<T> series = splat(kTwoLog2E / (2 * kTerms + 1));
#pragma GCC unroll 16
  for (int k = kTerms - 1; k >= 0; k--) series = series * square + kTwoLog2E / (2 * k + 1);
  return s * series;
}

// Both from 2^-|x|: log2(1 + 2^x), 0 below the smallest normal number, and its derivative 1 / (1 + 2^-x).
template <class T>
struct Logistic {
  Vec<T> x, decay;

  explicit Logistic(Vec<T> value) : x(value), decay(exp2(-maximum(value, -value))) {}
  Vec<T> softplus2() const { return maximum(x, Vec<T>{}) + log2_of_1_plus<T>(decay); }
  Vec<T> sigmoid2() const {
    const Vec<T> larger = T(1) / (decay + T(1));
    return x > T(0) ? larger : decay * larger;
  }
};

// A vector of pairs: of the negatives their logits, of the positives minus theirs.
template <class T>
struct SignedLogits {
  Vec<T> value, one_if_positive;
};
template <class T>
SignedLogits<T> signed_logits(const T* negative, const T* positive, Vec<T> bias) {
  const Vec<T> p = load(positive), zero = {};
  const auto is_positive = p != empty_vector<T>();
  return {is_positive ? -(p + bias) : load(negative) + bias, is_positive ? splat(T(1)) : zero};
}

template <class T>
void logistic_sums(Tile<T> tile, const T* positive, const T* bias, Sum<T> negatives, Sum<T> positives) {
  for (int64_t i = 0; i < vectors_of(tile) * kLanes<T>; i += kLanes<T>) {
    const Vec<T> offset = load(bias + i), zero = {};
    if (!positive) {
      const Vec<T> sum = sum_of_rows<T>(
          tile.rows, [&](int64_t r) { return Logistic<T>(load(tile.row(r) + i) + offset).softplus2(); });
      add(negatives + i, sum, splat(T(1)));
      continue;
    }
    Vec<T> of_positives = {}, block = {};
    const Vec<T> of_negatives = sum_of_rows<T>(tile.rows, [&](int64_t r) {
      const SignedLogits<T> x = signed_logits<T>(tile.row(r) + i, positive + r * tile.stride + i, offset);
      const Vec<T> value = Logistic<T>(x.value).softplus2();
      if (r % kSumRows == 0) {
        of_positives += block;
        block = zero;
      }
      block += x.one_if_positive > T(0) ? value : zero;
      return x.one_if_positive > T(0) ? zero : value;
    });
    add(negatives + i, of_negatives, splat(T(1)));
    add(positives + i, of_positives + block, splat(T(1)));
  }
}

template <class T>
void logistic_weights(Tile<T> tile, const T* positive, const T* bias, const T* negative_factor,
                      const T* positive_factor, Sum<T> total) {
  for (int64_t i = 0; i < vectors_of(tile) * kLanes<T>; i += kLanes<T>) {
    const Vec<T> offset = load(bias + i), factor = load(negative_factor + i),
                 of_positive = load(positive_factor + i);
    auto weigh = [&](int64_t r) {
      T* const s = tile.row(r) + i;
      if (!positive) {
        const Logistic<T> pair(load(s) + offset);
        store(s, pair.sigmoid2() * factor);
        return pair;
      }
      const SignedLogits<T> x = signed_logits<T>(s, positive + r * tile.stride + i, offset);
      const Logistic<T> pair(x.value);
      store(s, pair.sigmoid2() * (x.one_if_positive > T(0) ? of_positive : factor));
      return pair;
    };
    if (total.sum) {
      const Vec<T> sum = sum_of_rows<T>(tile.rows, [&](int64_t r) { return weigh(r).softplus2(); });
      add(total + i, sum, splat(T(1)));
    } else {
      for (int64_t r = 0; r < tile.rows; r++) weigh(r);
    }
  }
}

template <class T>
void add_lane_sums(Tile<T> tile, T* out) {
  for (int64_t i = 0; i < vectors_of(tile) * kLanes<T>; i += kLanes<T>)
    store(out + i,
          load(out + i) + sum_of_rows<T>(tile.rows, [&](int64_t r) { return load(tile.row(r) + i); }));
}

}  // namespace
}  // namespace fastcl::cpu
