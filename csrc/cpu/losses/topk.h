// The k most similar keys of each query, streaming.
#pragma once

#include <type_traits>
#include <vector>

#include "cpu/run/problem.h"

namespace fastcl::cpu {

// A value as an unsigned number, in descending order of values; NaN comes first, as in torch.topk.
template <class T>
using Order = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// Collects each query's best k logits from tiles. Keys below a threshold are dropped at once: where k is
// small against the keys, a first one is estimated from a sample of them, so that little more than k
// candidates per query are ever kept.
template <class T>
class Selector {
 public:
  Selector(const Problem<T>& problem, int64_t k, int64_t parts, bool estimate);

  // Keys of a part must come in ascending order; parts may run on different threads.
  void offer(Tile<T> tile, int64_t query_begin, int64_t part, int64_t key_begin, Scratch& scratch);
  // Whether nothing can be missing: a query that found less than k may have had too high an estimate.
  bool complete() const;
  // Values and indices are (N, k), descending, ties to the lower index, padded with -inf and -1.
  // `unit` is what one unit of similarity is in the logits.
  void write(T unit, T* values, int64_t* indices);

 private:
  // In a part's candidates the indices ascend.
  struct Candidate {
    Order<T> order;
    int64_t index;
  };
  void shrink(std::vector<Candidate>& candidates, T* threshold) const;
  static void sort(std::vector<Candidate>& candidates, std::vector<Candidate>& spare);

  int64_t queries_, k_, parts_, stride_;
  bool estimated_ = false;
  Buffer<T> threshold_;                             // [parts, stride]
  std::vector<std::vector<Candidate>> candidates_;  // [parts * queries]
};

// With a scale of -1 the least similar, ascending, padded with inf; of similarities below their query's bound
// only (null: any).
template <class T>
void topk(const Problem<T>& problem, int64_t k, T* values, int64_t* indices, const T* below = nullptr);

}  // namespace fastcl::cpu
