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

// The same with the keys' gradient: three products. Keeps weights from the first sweep over the keys for the
// second: of a strip of queries for each thread, or, where those would be few or large, of as many queries at
// a time as fit into a bounded amount of memory; `weights_fit` says whether that is reasonable. factor(i,
// max, sum): what multiplies row i's weights for the keys' sums.
template <class T>
using RowFactor = std::function<T(int64_t, T, T)>;
// sums(j, count, sum, scratch) receives sum_i factor_i exp2(l_ij - max_i) x_i of keys j to j + count, at most
// kMaxTile, padded to whole vectors, to do with as it likes.
template <class T>
using KeySums = std::function<void(int64_t, int64_t, T*, Scratch&)>;
template <class T>
bool weights_fit(const Problem<T>& problem);
template <class T>
Attended<T> attend_with_keys(const Problem<T>& problem, const RowFactor<T>& factor, const KeySums<T>& sums);

}  // namespace fastcl::cpu
