// MoCHi: a queue of negatives plus synthetic ones mixed from each query's hardest keys.
#pragma once

#include "cpu/run/unit_rows.h"

namespace fastcl::cpu {

template <class T>
struct Mochi {
  Input query, positive, keys;
  double scale;
  int64_t n_hard, n_mix, n_query_mix;
  // ranks in a query's hard list, (N, n_mix) and (N, n_query_mix), and mixing weights
  const int64_t *first, *second, *partner;
  const T *alpha, *beta;
};

// Per query, for an incoming gradient of 1; null where not wanted.
template <class T>
struct MochiResult {
  T* loss;              // (N)
  T *query, *positive;  // (N, D)
  T* scale;             // (N)
};

template <class T>
void mochi(const Mochi<T>& args, const MochiResult<T>& result);

}  // namespace fastcl::cpu
