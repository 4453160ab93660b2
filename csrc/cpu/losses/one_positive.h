// The losses with one positive per row, value and gradients in one call.
#pragma once

#include "cpu/run/unit_rows.h"
#include "layout.h"

namespace fastcl::cpu {

struct OnePositive {
  Input query, positive, negatives;
  double scale;
  const int64_t *query_ids, *negative_ids;
  Layout layout;
  bool normalize, normalize_negatives;
  bool mean;
  Precision precision;
};

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
