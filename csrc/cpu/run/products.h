// The three products of a tile and the operands they are made from: in T, or of bfloat16 pairs.
#pragma once

#include "cpu/run/problem.h"

namespace fastcl::cpu {

// Of one task: the lanes and rows of its present tile, each converted at most once.
template <class T>
class Products {
 public:
  virtual ~Products() = default;

  // The lanes and rows of the tiles that follow.
  virtual void set_lanes(int64_t begin, int64_t count) = 0;
  virtual void set_rows(int64_t begin, int64_t count) = 0;
  // Multiplies the present lanes by `factor` in add_to_rows().
  virtual void scale_lanes(const T* factor) = 0;

  // tile = scaled similarities + bias of the rows
  virtual void logits(Tile<T> tile) = 0;
  // out += tile^T rows; the outputs' rows are of whole vectors, as are their strides
  virtual void add_to_lanes(Tile<T> tile, T* out) = 0;
  // out += tile lanes
  virtual void add_to_rows(Tile<T> tile, T* out) = 0;
};

// For tiles of at most max_rows x max_lanes. Takes the scratch slots from kPackedSlot on, and may be used
// once at a time.
template <class T>
std::unique_ptr<Products<T>> make_products(const Problem<T>& problem, int64_t max_rows, int64_t max_lanes,
                                           Scratch& scratch);

}  // namespace fastcl::cpu
