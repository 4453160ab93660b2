// The pair rule beyond one test of ids: what it leaves out of a tile, and which pairs are positive.
#pragma once

#include <vector>

#include "cpu/run/problem.h"

namespace fastcl::cpu {

// A byte per pair, nonzero for its members. Where it is smaller than the matrix, it repeats.
struct Mask {
  const uint8_t* data;
  int64_t queries, keys, query_stride, key_stride;
};

bool is_symmetric(const Mask& mask);

// Pairs of which any description suffices: equal ids, or a mask.
struct PairSets {
  std::vector<Ids> ids;
  std::vector<Mask> masks;

  bool empty() const { return ids.empty() && masks.empty(); }
};

struct PairRule {
  PairSets exclude, positive;
  PairSets only;  // where not empty: all others are excluded
  Ids within;     // pairs whose ids differ are excluded
  const int64_t* exclude_keys =
      nullptr;  // (N, excluded_per_query): keys excluded of a query; -1 says nothing
  int64_t excluded_per_query = 0;
};

template <class T>
bool has_positives(const Problem<T>& problem) {
  return problem.positive.row || (problem.rule && !problem.rule->positive.empty()) || problem.second_scale;
}
// Excludes from a tile of logits, whose first pair is of these.
template <class T>
void exclude_pairs(const Problem<T>& problem, Tile<T> tile, int64_t query_begin, int64_t key_begin,
                   Scratch& scratch);
// As Kernels::split; false if there are no positives, with both tiles as they were.
template <class T>
bool split_pairs(const Problem<T>& problem, Tile<T> tile, Split<T> to, int64_t query_begin, int64_t key_begin,
                 PositiveSums<T> lane, PositiveSums<T> row, Scratch& scratch);

}  // namespace fastcl::cpu
