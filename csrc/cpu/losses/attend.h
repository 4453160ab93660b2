// Row-softmax in one pass over the keys: the statistics and what the gradient needs of them at once.
#pragma once

#include <functional>

#include "cpu/losses/topk.h"

namespace fastcl::cpu {

template <class T>
struct Attended {
  State<T> rows;
  Partials<T> query;  // one part: sum_j exp2(l_ij - max_i) y_j
};

// Negatives only, per query. Two products: similarity and weighted keys.
// Each tile's logits are offered to `selector` on the way (null: to none), in parts_of_keys() parts.
template <class T>
Attended<T> attend(const Problem<T>& problem, Selector<T>* selector = nullptr);

// The same with the keys' gradient in the same pass: three products. Keeps a strip of one block of
// queries by all keys; `strips_fit` says whether that is reasonable.
template <class T>
struct AttendedKeys {
  Attended<T> queries;
  Partials<T> key;  // sum_i factor_i exp2(l_ij - max_i) x_i
};
template <class T>
bool strips_fit(const Problem<T>& problem);
// factor(i, max, sum): what multiplies row i's weights for the keys' sums.
template <class T>
AttendedKeys<T> attend_with_keys(const Problem<T>& problem, const std::function<T(int64_t, T, T)>& factor);

}  // namespace fastcl::cpu
