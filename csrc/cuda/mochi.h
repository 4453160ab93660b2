// MoCHi after the pass over the queue: what the kernel that mixes synthetic negatives is given.
#pragma once

#include <cstdint>

#include "cuda/grid.h"

namespace fastcl::cuda {

// Shared memory of a block, in floats; the first is a query's unit row.
struct MixingFloats {
  int64_t squared;     // (n_hard) of the hard keys' norms
  int64_t similarity;  // (n_hard) of the hard keys to the query
  int64_t weight;      // (warps, n_hard) of the hard keys in the gradient
  int64_t logit;       // (synthetics) in log2 units
  int64_t inverse;     // (synthetics) 1 / norm
  int64_t on_query;    // (warps) the query's weight
  int64_t pull;        // (warps, width) weighted sums of hard keys
  int64_t total;

  constexpr MixingFloats(int64_t width, int64_t n_hard, int64_t synthetics)
      : squared(width),
        similarity(squared + n_hard),
        weight(similarity + n_hard),
        logit(weight + kWarps * n_hard),
        inverse(logit + synthetics),
        on_query(inverse + synthetics),
        pull(on_query + kWarps),
        total(pull + kWarps * width) {}
  constexpr int64_t bytes() const { return total * int64_t(sizeof(float)); }
};

// Of all rows: the keys' first and second ranks in a query's list of hard ones, the first's weight.
template <class T, class Key>
struct Mixing {
  const T *query, *positive;  // (rows, width), strides apart
  int64_t query_stride, positive_stride;
  const Key* keys;  // (size, width)
  const float* scale;
  const int64_t* hard;                 // (rows, n_hard) keys
  const float *queue_max, *queue_sum;  // (rows) of the queue's logits, in log2 units: sum * exp2(max)
  const float* queue_mean;  // (rows, width) of the queue's keys, by their probabilities in the queue
  const int64_t *first, *second, *partner;  // (rows, n_mix) twice, (rows, n_query_mix): ranks in `hard`
  const float *alpha, *beta;                // the weights of `first`, and of the query beside `partner`
  // gradients are for an incoming 1 per row
  float *loss, *grad_query, *grad_positive, *grad_scale;
  int rows, width, n_hard, n_mix, n_query_mix;

  constexpr int synthetics() const { return n_mix + n_query_mix; }
  constexpr MixingFloats floats() const { return {width, n_hard, synthetics()}; }
};

}  // namespace fastcl::cuda
