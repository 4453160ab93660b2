// Products of bfloat16, summed in float32: what the instruction sets with such units offer beside Kernels.
//
// Their operands are pairs: two neighbours along the summed dimension, the even one low. A float32 matrix
// may be split into two parts, its rounding and the rounded rest; three products of parts then make one.
#pragma once

#include "cpu/simd/kernels.h"

namespace fastcl::cpu {

using Pair = uint32_t;
constexpr int64_t kPairDepth = 32;  // summed dimensions are padded to it with zeros
constexpr int64_t kPairPanel = 32;  // columns of a packed panel
static_assert(kLaneUnit % kPairPanel == 0);
constexpr int kMaxParts = 2;

// Rows as bfloat16, `depth` per part, the parts side by side.
struct BFloat16Rows {
  const uint16_t* data = nullptr;
  int64_t stride = 0;
  int64_t depth = 0;              // a multiple of kPairDepth
  const float* factor = nullptr;  // per row: what it is to be multiplied by

  FASTCL_ALWAYS_INLINE const uint16_t* row(int64_t i) const { return data + i * stride; }
};

// The right-hand side of a product: panels [columns / 32][depth / 2][32], one block of them per part.
struct PackedPairs {
  Pair* data;
  int64_t part_stride;
};

struct BFloat16Kernels {
  // Rounds rows of float32 or bfloat16.
  void (*load_rows)(uint16_t* dst, int64_t depth, int parts, const void* src, DType dtype, int64_t src_stride,
                    int64_t rows, int64_t width);
  // Packs rows as columns, with their components as depth; and components as columns, with rows as depth.
  void (*pack_rows)(PackedPairs packed, BFloat16Rows x, int parts, int64_t rows);
  void (*pack_components)(PackedPairs packed, BFloat16Rows x, int parts, int64_t rows);

  // tile = (y x^T) factor of the row * lane_factor * scale + bias (null: 0), bias per row; lanes past the
  // last are excluded. `x` is packed by rows.
  void (*logits)(Tile<float> tile, BFloat16Rows y, PackedPairs x, int parts, const float* lane_factor,
                 float scale, const float* bias);
  // lane_out += tile^T (row_factor y), `y` packed by components, out of `width` floats per row. Rounds the
  // tile into `rounded`, which holds `parts` tiles of bfloat16.
  void (*add_to_lanes)(Tile<float> tile, const float* row_factor, PackedPairs y, int parts, Pair* rounded,
                       float* out, int64_t width);
  // row_out += tile (lane_factor x), `x` packed by components.
  void (*add_to_rows)(Tile<float> tile, const float* lane_factor, PackedPairs x, int parts, Pair* rounded,
                      float* out, int64_t width);
};

// Each is defined by bfloat16.cpp, compiled once per instruction set.
const BFloat16Kernels* bfloat16_kernels_avx512_bf16();
const BFloat16Kernels* bfloat16_kernels_amx();

}  // namespace fastcl::cpu
