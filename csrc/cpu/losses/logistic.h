// Sums of softplus over each query's pairs, and their gradient.
#pragma once

#include "cpu/losses/stats.h"

namespace fastcl::cpu {

// A vector per query, whole vectors long.
template <class T>
Buffer<T> padded(const T* values, int64_t count, T factor);

// sums (2, N): of softplus(l + bias) over negatives, of softplus(-l - bias) over positives. `bias2` is
// padded.
template <class T>
void logistic_sums(const Problem<T>& problem, const T* bias2, T* sums);

// Of the sums' gradient (2, N).
template <class T>
PairSums<T> logistic_pair_sums(const Problem<T>& problem, const T* bias2, const T* grad, Wanted wanted);

// `total` is `incoming` times the sum of all sums; returns its gradients' sums, in the same walk.
template <class T>
PairSums<T> logistic_total(const Problem<T>& problem, const T* bias2, T incoming, Wanted wanted, T* total);

}  // namespace fastcl::cpu
