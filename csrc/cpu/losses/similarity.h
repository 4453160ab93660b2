// A call of the statistics as it comes: inputs of any type, their statistics, and the inputs' gradients.
#pragma once

#include "cpu/losses/stats.h"
#include "cpu/run/pair_rule.h"
#include "cpu/run/unit_rows.h"

namespace fastcl::cpu {

struct SimilarityCall {
  Input query, key;  // symmetric: key is query
  double scale;
  const void *key_scale, *bias2;  // (M) of the compute type, or null
  PairRule rule;
  bool normalize, symmetric, columns;
  Precision precision;
  double second_scale;  // as Problem's
};

// Statistics, as StatisticsFields, and what of them the backward pass takes, as StateFields. Null where not
// wanted.
template <class T>
struct SimilarityResult {
  T *rows, *row_state, *columns, *column_state;
  T* weighted;  // (N, D): sum_j p_ij y_j
};
template <class T>
struct SimilaritySaved {
  const T *grad_rows, *row_state, *grad_columns, *column_state;
};
// Contiguous, null where not wanted. For a symmetric call `query` receives both roles' gradient.
template <class T>
struct SimilarityGradients {
  T *query, *key;
  double* scale;
  T *bias, *key_scale;
};

template <class T>
void similarity_forward(const SimilarityCall& call, const SimilarityResult<T>& result);
// As topk(), the least similar keys if not `largest`.
template <class T>
void similarity_topk(const SimilarityCall& call, int64_t k, bool largest, const T* below, T* values,
                     int64_t* indices);
// As sinkhorn().
template <class T>
void similarity_sinkhorn(const SimilarityCall& call, int64_t steps, T* of_keys);
// Sums of softplus: as logistic_sums(); `bias` (N) in natural units.
template <class T>
void similarity_logistic(const SimilarityCall& call, const T* bias, T* sums);
// The gradients of query, key, scale and bias (N), each null where not wanted, from that of the sums (2, N).
template <class T>
struct LogisticGradients {
  T *query, *key;
  double* scale;
  T* bias;
};
template <class T>
void similarity_logistic_backward(const SimilarityCall& call, const T* bias, const T* grad,
                                  const LogisticGradients<T>& result);
// The sum of all sums, or its mean over the queries, and the gradients of that.
template <class T>
void similarity_logistic_total(const SimilarityCall& call, const T* bias, bool mean, T* total,
                               const LogisticGradients<T>& result);
template <class T>
void similarity_backward(const SimilarityCall& call, const SimilaritySaved<T>& saved,
                         const SimilarityGradients<T>& result);

}  // namespace fastcl::cpu
