// Statistics of all rows (and columns) of a similarity matrix, and their gradient.
#pragma once

#include <functional>
#include <optional>

#include "cpu/run/problem.h"

namespace fastcl::cpu {

// The logits of the first tiles, kept from the statistics for the backward pass: a bounded amount of
// memory that saves up to half a product, unless it is too small a part of the matrix to matter.
template <class T>
struct KeptTiles {
  Buffer<T> tiles;
  Plan plan;
  int64_t capacity = 0;

  // Null where the tile is not kept.
  T* tile(int64_t query_block, int64_t key_block) const {
    const int64_t blocks = plan.key.blocks, block = plan.key.block;
    const int64_t index = plan.symmetric ? query_block * (2 * blocks - query_block - 1) / 2 + key_block
                                         : query_block * blocks + key_block;
    return index < capacity ? tiles.get() + index * block * block : nullptr;
  }
  explicit operator bool() const { return capacity > 0; }
};
template <class T>
KeptTiles<T> make_kept_tiles(const Problem<T>& problem);

template <class T>
struct Statistics {
  State<T> rows;     // per query; for a symmetric problem both roles
  State<T> columns;  // per key, where asked for
};

template <class T>
Statistics<T> statistics(const Problem<T>& problem, bool columns, const KeptTiles<T>& keep = {});

// Weights of a side's pairs in the backward pass: arrays over all its rows, whole vectors long.
template <class T>
struct SideWeights {
  Buffer<T> memory;
  int64_t stride = 0;

  enum Field { kNegMax, kNegFactor, kPosMax, kPosFactor, kConstant, kFields };
  T* field(int f) const { return memory.get() + f * stride; }
  Weight<T> negative(int64_t i) const { return {field(kNegMax) + i, field(kNegFactor) + i}; }
  Weight<T> positive(int64_t i) const { return {field(kPosMax) + i, field(kPosFactor) + i}; }
  typename Kernels<T>::PairWeight pair(int64_t i) const {
    return {negative(i), positive(i), field(kConstant) + i};
  }
  explicit operator bool() const { return static_cast<bool>(memory); }
};
template <class T>
SideWeights<T> make_side_weights(int64_t count);

// sum_j dl_ij y_j per query, sum_i dl_ij x_i per key, sum_i dl_ij per key and sum_j dl_ij per query; each in
// parts to be added. For a symmetric problem `query` holds both roles.
template <class T>
struct PairSums {
  Partials<T> query, key, bias, query_bias;
  // sum_ij dl_ij <x_i, y_j>, of weights that were not rounded; only where products are of bfloat16 (never at
  // a scale of 0). It may all but cancel, and the rows of `query` times x_i would not.
  std::optional<double> scale;
};

struct Wanted {
  bool query, key, bias, scale;
  bool query_bias = false;
};

// Of the dl_ij that weigh(task, tile, positive, query_begin, key_begin) makes of a tile's logits, in their
// place; `positive` holds those of the positives, or no memory. The logits are taken from `kept` if they are
// there.
template <class T>
using Weigh = std::function<void(const Plan::Task&, Tile<T>, Tile<T>, int64_t, int64_t)>;
template <class T>
PairSums<T> weighted_sums(const Problem<T>& problem, const Weigh<T>& weigh, Wanted wanted,
                          const KeptTiles<T>& kept = {});

// Of the statistics' weights; `columns` is empty without column statistics.
template <class T>
PairSums<T> pair_sums(const Problem<T>& problem, const SideWeights<T>& rows, const SideWeights<T>& columns,
                      Wanted wanted, const KeptTiles<T>& kept = {});

}  // namespace fastcl::cpu
