// SupCon, value and gradients in one call.
#pragma once

#include "cpu/run/pair_rule.h"
#include "cpu/run/unit_rows.h"

namespace fastcl::cpu {

// Row i of the queries is row i of the keys: it takes no part in its own loss.
struct SupCon {
  Input query, key;  // no key rows: the queries are the keys
  double scale;
  const int64_t *query_labels, *key_labels;
  Mask positive;  // of samples, instead of the labels; without data: none
  bool normalize;
  bool log_of_mean;  // variant 'in', else 'out'
  bool mean;
  Precision precision;

  bool own_keys() const { return key.count == 0; }
};

// Where results go; gradients are for an incoming gradient of 1, null where not wanted.
template <class T>
struct SupConResult {
  T* loss;
  T *query, *key;  // contiguous
  double* scale;
};

template <class T>
void sup_con(const SupCon& args, const SupConResult<T>& result);

}  // namespace fastcl::cpu
