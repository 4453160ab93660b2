// The losses with one positive per row, value and gradients in one call.
#pragma once

#include "cpu/run/unit_rows.h"
#include "layout.h"

namespace fastcl::cpu {

struct OnePositive {
  Input query, positive, negatives;
  double scale;
  const int64_t *query_ids, *negative_ids;  // of the assigned layout: which of the negatives is the positive
  Layout layout;
  bool normalize, normalize_negatives;
  bool decoupled;  // lse_neg less the positive's logit, in place of its softplus
  bool mean;
  Precision precision;
};

// A row's loss, and its slope, from how far its negatives' log-sum-exp lies above its positive's logit.
// Without negatives both are 0.
template <class T>
SoftPlus<T> loss_of_row(const OnePositive& args, T excess) {
  if (!args.decoupled) return softplus(excess);
  const T empty = excess == -INFINITY;
  return {empty ? T(0) : excess, empty ? T(0) : excess - excess + 1};
}

// Where results go; gradients are for an incoming gradient of 1, null where not wanted.
template <class T>
struct OnePositiveResult {
  T* loss;
  T *query, *positive, *negatives;  // contiguous
  double* scale;
};

template <class T>
void one_positive(const OnePositive& args, const OnePositiveResult<T>& result);

}  // namespace fastcl::cpu
