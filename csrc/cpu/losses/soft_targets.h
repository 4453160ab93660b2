// Cross-entropy between two softmaxes over the same keys, and its gradient: two products per tile and view.
#pragma once

#include "cpu/run/pair_rule.h"
#include "cpu/run/unit_rows.h"

namespace fastcl::cpu {

// Rows of queries that share their keys, stacked: those of the views, or of the teachers.
struct SoftmaxCall {
  Input query, key;
  double scale;
};
struct SoftTargetCall {
  SoftmaxCall views, teachers;
  const void* target_bias2;  // (K) of the compute type, log2 units, or null
  PairRule rule;             // without positives
  int64_t count;             // of queries in a view
  bool normalize;
  Precision precision;

  int64_t view_count() const { return views.query.count / std::max<int64_t>(count, 1); }
  int64_t teacher_count() const { return teachers.query.count / std::max<int64_t>(count, 1); }
};

// How many logits of all softmaxes there are to keep from a forward pass for its backward pass.
int64_t logits_to_keep(const SoftTargetCall& call);

// losses (V, N); state (2 (V + T), N): maximum and sum of each view's softmax, then of each teacher's;
// `kept` receives the logits (null: they are not kept).
template <class T>
void soft_cross_entropy(const SoftTargetCall& call, T* losses, T* state, T* kept);

// Contiguous, null where not wanted. `kept` is null where nothing was.
template <class T>
struct SoftTargetGradients {
  T *query, *key;
  double* scale;
};
template <class T>
void soft_cross_entropy_backward(const SoftTargetCall& call, const T* grad, const T* state, const T* kept,
                                 const SoftTargetGradients<T>& result);

}  // namespace fastcl::cpu
