// A product of pairs on the units of the instruction set this file is compiled for: AMX tiles or vdpbf16ps.
#pragma once

#include <immintrin.h>

#include "cpu/simd/bfloat16.h"

namespace fastcl::cpu {
namespace {

// A sum is formed in blocks of so many pairs: its error grows with a block and the number of blocks. A
// block's sum of tiles passes through memory, which costs as much as the product of about 100 pairs.
#if defined(__AMX_BF16__)
constexpr int64_t kPairBlock = 512;
#else
constexpr int64_t kPairBlock = 64;
#endif

// c (rows, columns) is the sum of the terms' a (rows, depth) b (depth, columns): added to what c holds or,
// with factors, c = sum * (row factor * column factor) * scale + offset of the row (null: 0).
struct PairProduct {
  struct Term {
    const Pair *a, *b;
  };
  int64_t rows, columns, depth;  // columns: a multiple of 16; depth: in pairs, a multiple of 16
  int terms;
  Term term[3];
  int64_t a_row, a_depth;  // strides of a
  int64_t panel_stride;
  float* c;
  int64_t c_stride;
  const float *row_factor = nullptr, *column_factor = nullptr, *offset = nullptr;
  float scale = 1;

  // Of a block's sum, what c becomes there; `first` is the block that c starts from.
  template <bool FACTORS>
  void finish(__m512 sum, int64_t row, int64_t column, bool first) const {
    float* const to = c + row * c_stride + column;
    if constexpr (FACTORS) {
      const __m512 factor = _mm512_set1_ps(row_factor[row]) * _mm512_loadu_ps(column_factor + column);
      const __m512 start = first ? _mm512_set1_ps(offset ? offset[row] : 0.0f) : _mm512_loadu_ps(to);
      _mm512_storeu_ps(to, sum * (factor * _mm512_set1_ps(scale)) + start);
    } else {
      _mm512_storeu_ps(to, sum + _mm512_loadu_ps(to));
    }
  }
};

// Of the depth, what is summed at once.
struct PairSlice {
  int64_t begin, depth;
  bool first;
};

constexpr int64_t kPairVector = kPairPanel / 2;  // a vector, or a row of an AMX tile

#if defined(__AMX_BF16__)

constexpr int64_t kBlockRows = 32;

// Intrinsics for these lack memory clobbers in some compilers.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};

  // Accumulators 0 1 over 2 3, left operands 4 over 5, right operands 6 beside 7.
  explicit TileConfiguration(int64_t block_rows) {
    const uint8_t upper = static_cast<uint8_t>(block_rows < 16 ? block_rows : 16);
    const uint8_t lower = static_cast<uint8_t>(block_rows > 16 ? block_rows - 16 : 16);
    for (int i = 0; i < 8; i++) column_bytes[i] = 64;
    rows[0] = rows[1] = rows[4] = upper;
    rows[2] = rows[3] = rows[5] = lower;
    rows[6] = rows[7] = 16;
  }
  void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
};
static_assert(sizeof(TileConfiguration) == 64);

#define FASTCL_TILE_LOAD(n, from, stride_bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #n::"r"(from), "r"(stride_bytes) : "memory")
#define FASTCL_TILE_STORE(n, to, stride_bytes) \
  asm volatile("tilestored %%tmm" #n ", (%0,%1,1)" ::"r"(to), "r"(stride_bytes) : "memory")
#define FASTCL_TILE_ZERO(n) asm volatile("tilezero %%tmm" #n::: "memory")
#define FASTCL_TILE_PRODUCT(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::: "memory")

template <bool FACTORS>
void product_block(const PairProduct& p, const PairSlice& slice, int64_t i, int64_t j, int64_t rows,
                   int64_t columns) {
  const bool lower = rows > 16, right = columns > kPairVector;
  const int64_t a_stride = p.a_row * sizeof(Pair), b_stride = kPairPanel * sizeof(Pair);
  FASTCL_TILE_ZERO(0);
  FASTCL_TILE_ZERO(1);
  FASTCL_TILE_ZERO(2);
  FASTCL_TILE_ZERO(3);
  for (int t = 0; t < p.terms; t++) {
    const Pair* a = p.term[t].a + i * p.a_row + slice.begin;
    const Pair* b = p.term[t].b + j / kPairPanel * p.panel_stride + slice.begin * kPairPanel;
    for (int64_t k = 0; k < slice.depth; k += 16, a += 16, b += 16 * kPairPanel) {
      FASTCL_TILE_LOAD(6, b, b_stride);
      FASTCL_TILE_LOAD(4, a, a_stride);
      FASTCL_TILE_PRODUCT(0, 4, 6);
      if (right) {
        FASTCL_TILE_LOAD(7, b + kPairVector, b_stride);
        FASTCL_TILE_PRODUCT(1, 4, 7);
      }
      if (lower) {
        FASTCL_TILE_LOAD(5, a + 16 * p.a_row, a_stride);
        FASTCL_TILE_PRODUCT(2, 5, 6);
        if (right) FASTCL_TILE_PRODUCT(3, 5, 7);
      }
    }
  }
  alignas(64) float sums[kBlockRows * kPairPanel];
  const int64_t sums_stride = kPairPanel * sizeof(float);
  float* const lower_sums = sums + 16 * kPairPanel;
  FASTCL_TILE_STORE(0, sums, sums_stride);
  if (right) FASTCL_TILE_STORE(1, sums + kPairVector, sums_stride);
  if (lower) FASTCL_TILE_STORE(2, lower_sums, sums_stride);
  if (lower && right) FASTCL_TILE_STORE(3, lower_sums + kPairVector, sums_stride);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t column = 0; column < columns; column += kPairVector)
      p.finish<FACTORS>(_mm512_load_ps(sums + r * kPairPanel + column), i + r, j + column, slice.first);
}

// The tiles of a thread, which no other code may have in use.
class Units {
 public:
  Units() { TileConfiguration(kBlockRows).load(); }
  ~Units() { asm volatile("tilerelease"); }
  void set_rows(int64_t rows) {
    if (rows != rows_) TileConfiguration(rows).load();
    rows_ = rows;
  }

 private:
  int64_t rows_ = kBlockRows;
};

#else

constexpr int64_t kBlockRows = 12;  // 24 accumulators of 32 registers

template <bool FACTORS, int ROWS, int VECTORS>
void product_rows(const PairProduct& p, const PairSlice& slice, int64_t i, int64_t j) {
  __m512 acc[ROWS][VECTORS] = {};
  for (int t = 0; t < p.terms; t++) {
    const Pair* a = p.term[t].a + i * p.a_row + slice.begin * p.a_depth;
    const Pair* b = p.term[t].b + j / kPairPanel * p.panel_stride + slice.begin * kPairPanel;
    for (int64_t k = 0; k < slice.depth; k++, a += p.a_depth, b += kPairPanel) {
      __m512bh bv[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) bv[v] = (__m512bh)_mm512_loadu_si512(b + v * kPairVector);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * p.a_row]));
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, bv[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) p.finish<FACTORS>(acc[r][v], i + r, j + v * kPairVector, slice.first);
  }
}

template <bool FACTORS, int ROWS = kBlockRows>
void product_block(const PairProduct& p, const PairSlice& slice, int64_t i, int64_t j, int64_t rows,
                   int64_t columns) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return product_block<FACTORS, ROWS - 1>(p, slice, i, j, rows, columns);
    if (columns > kPairVector)
      product_rows<FACTORS, ROWS, 2>(p, slice, i, j);
    else
      product_rows<FACTORS, ROWS, 1>(p, slice, i, j);
  }
}

struct Units {
  void set_rows(int64_t) {}
};

#endif

template <bool FACTORS>
void multiply(const PairProduct& p, const PairSlice& slice, Units& units) {
  for (int64_t j = 0; j < p.columns; j += kPairPanel) {
    const int64_t columns = p.columns - j < kPairPanel ? p.columns - j : kPairPanel;
    for (int64_t i = 0; i < p.rows; i += kBlockRows) {
      const int64_t rows = p.rows - i < kBlockRows ? p.rows - i : kBlockRows;
      units.set_rows(rows);
      product_block<FACTORS>(p, slice, i, j, rows, columns);
    }
  }
}

void multiply(const PairProduct& p) {
  Units units;
  for (int64_t k = 0; k == 0 || k < p.depth; k += kPairBlock) {
    const PairSlice slice{k, p.depth - k < kPairBlock ? p.depth - k : kPairBlock, k == 0};
    p.row_factor ? multiply<true>(p, slice, units) : multiply<false>(p, slice, units);
  }
}

}  // namespace
}  // namespace fastcl::cpu
