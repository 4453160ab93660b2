// The bfloat16 kernels, compiled once per instruction set that has units for them (FASTCL_ISA names it).
// As in kernels.cpp, no standard library.
#include "cpu/simd/bfloat16.h"

#include "cpu/simd/pair_product.h"

namespace fastcl::cpu {
namespace {

// Sixteen float32 rounded into the low halves of sixteen words; and what rounding left.
__m512i rounded(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }
__m512 rest(__m512 x, __m512i high) { return x - (__m512)_mm512_slli_epi32(high, 16); }
__m512i joined(__m512i even, __m512i odd) { return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)); }
__mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << (count < 16 ? count : 16)) - 1); }

// Transposes 16 x 16 words.
void transpose(const Pair* src, int64_t src_stride, int64_t rows, Pair* dst, int64_t dst_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = i < rows ? _mm512_loadu_si512(src + i * src_stride) : __m512i{};
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    for (int half = 0; half < 16; half += 8) {
      b[half + i] = _mm512_shuffle_i32x4(a[half + i], a[half + 4 + i], 0x88);
      b[half + 4 + i] = _mm512_shuffle_i32x4(a[half + i], a[half + 4 + i], 0xdd);
    }
  }
  for (int i = 0; i < 8; i++) {
    _mm512_storeu_si512(dst + i * dst_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
    _mm512_storeu_si512(dst + (8 + i) * dst_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
  }
}

void load_rows(uint16_t* dst, int64_t depth, int parts, const void* src, DType dtype, int64_t src_stride,
               int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++, dst += parts * depth) {
    for (int64_t k = 0; k < depth; k += 16) {
      const __mmask16 mask = first(width > k ? width - k : 0);
      const int64_t at = r * src_stride + k;
      __m512i high, low = {};
      if (dtype == DType::bfloat16) {
        high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(src) + at));
      } else {
        const __m512 x = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(src) + at);
        high = rounded(x);
        low = rounded(rest(x, high));
      }
      _mm256_storeu_si256((__m256i*)(dst + k), _mm512_cvtepi32_epi16(high));
      if (parts > 1) _mm256_storeu_si256((__m256i*)(dst + depth + k), _mm512_cvtepi32_epi16(low));
    }
  }
}

const Pair* pairs_of(BFloat16Rows x, int64_t row, int part) {
  return reinterpret_cast<const Pair*>(x.row(row) + part * x.depth);
}

void pack_rows(PackedPairs packed, BFloat16Rows x, int parts, int64_t rows) {
  const int64_t depth = x.depth / 2, stride = x.stride / 2;
  for (int part = 0; part < parts; part++) {
    for (int64_t row = 0; row < round_up(rows, kPairPanel); row += kPairVector) {
      Pair* panel = packed.data + part * packed.part_stride + row / kPairPanel * depth * kPairPanel;
      const int64_t count = rows > row ? rows - row : 0;
      for (int64_t k = 0; k < depth; k += 16)
        transpose(pairs_of(x, row, part) + k, stride, count, panel + k * kPairPanel + row % kPairPanel,
                  kPairPanel);
    }
  }
}

void pack_components(PackedPairs packed, BFloat16Rows x, int parts, int64_t rows) {
  const int64_t depth = round_up(rows, kPairDepth) / 2;
  for (int part = 0; part < parts; part++) {
    Pair* panels = packed.data + part * packed.part_stride;
    for (int64_t k = 0; k < depth; k++) {
      auto load = [&](int64_t row, int64_t d) {
        if (row >= rows) return __m512i{};
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x.row(row) + part * x.depth + d)));
      };
      for (int64_t d = 0; d < x.depth; d += kPairVector)
        _mm512_storeu_si512(panels + d / kPairPanel * depth * kPairPanel + k * kPairPanel + d % kPairPanel,
                            joined(load(2 * k, d), load(2 * k + 1, d)));
    }
  }
}

// The terms of a product of split matrices, the largest last; the product of their second parts is below
// the rounding of the rest.
void set_terms(PairProduct& p, int parts, const Pair* a, int64_t a_part, PackedPairs b) {
  p.terms = 0;
  if (parts > 1) {
    p.term[p.terms++] = {a + a_part, b.data};
    p.term[p.terms++] = {a, b.data + b.part_stride};
  }
  p.term[p.terms++] = {a, b.data};
}

void logits(Tile<float> tile, BFloat16Rows y, PackedPairs x, int parts, const float* lane_factor, float scale,
            const float* bias) {
  PairProduct p;
  p.rows = tile.rows;
  p.columns = round_up(tile.lanes, kPairVector);
  p.depth = y.depth / 2;
  p.a_row = y.stride / 2;
  p.a_depth = 1;
  p.panel_stride = p.depth * kPairPanel;
  p.c = tile.s;
  p.c_stride = tile.stride;
  p.row_factor = y.factor;
  p.column_factor = lane_factor;
  p.scale = scale;
  p.offset = bias;
  set_terms(p, parts, pairs_of(y, 0, 0), y.depth / 2, x);
  multiply(p);
  for (int64_t r = 0; r < tile.rows; r++)
    for (int64_t l = tile.lanes; l < p.columns; l++) tile.row(r)[l] = excluded_logit<float>;
}

// ---- weights, rounded as left-hand sides ----

// A rounded tile: parts of `lines` rows of `stride` pairs.
struct Rounded {
  Pair* data;
  int64_t stride, lines;

  int64_t part_stride() const { return lines * stride; }
};

struct RoundedPairs {
  __m512i high, low;
};
// Rows `row` and `row + 1` of sixteen lanes; zeros past the last row.
RoundedPairs round_row_pairs(Tile<float> tile, const float* row_factor, int64_t row, int64_t lane) {
  __m512i high[2] = {}, low[2] = {};
  for (int64_t odd = 0; odd < 2 && row + odd < tile.rows; odd++) {
    const __m512 w = _mm512_loadu_ps(tile.row(row + odd) + lane) * _mm512_set1_ps(row_factor[row + odd]);
    high[odd] = rounded(w);
    low[odd] = rounded(rest(w, high[odd]));
  }
  return {joined(high[0], high[1]), joined(low[0], low[1])};
}

// Pairs along the rows, for a product that sums over them.
#if defined(__AMX_BF16__)
// [lane][row / 2], as AMX reads it
Rounded round_by_rows(Tile<float> tile, const float* row_factor, int parts, Pair* out) {
  const Rounded result{out, round_up(tile.rows, kPairDepth) / 2, round_up(tile.lanes, 16)};
  alignas(64) Pair buffer[kMaxParts][16 * 16];
  for (int64_t r = 0; r < tile.rows; r += kPairDepth) {
    for (int64_t l = 0; l < tile.lanes; l += 16) {
      for (int64_t k = 0; k < 16; k++) {
        const RoundedPairs pairs = round_row_pairs(tile, row_factor, r + 2 * k, l);
        _mm512_store_si512(buffer[0] + 16 * k, pairs.high);
        _mm512_store_si512(buffer[1] + 16 * k, pairs.low);
      }
      for (int part = 0; part < parts; part++)
        transpose(buffer[part], 16, 16, out + part * result.part_stride() + l * result.stride + r / 2,
                  result.stride);
    }
  }
  return result;
}
constexpr bool kPairsInLine = true;
#else
// [row / 2][lane], as vdpbf16ps may
Rounded round_by_rows(Tile<float> tile, const float* row_factor, int parts, Pair* out) {
  const Rounded result{out, tile.stride, round_up(tile.rows, kPairDepth) / 2};
  for (int64_t k = 0; k < result.lines; k++) {
    for (int64_t l = 0; l < tile.lanes; l += 16) {
      const RoundedPairs pairs = round_row_pairs(tile, row_factor, 2 * k, l);
      Pair* to = out + k * result.stride + l;
      _mm512_storeu_si512(to, pairs.high);
      if (parts > 1) _mm512_storeu_si512(to + result.part_stride(), pairs.low);
    }
  }
  return result;
}
constexpr bool kPairsInLine = false;
#endif

// Pairs along the lanes: [row][lane / 2].
Rounded round_by_lanes(Tile<float> tile, const float* lane_factor, int parts, Pair* out) {
  const Rounded result{out, round_up(tile.lanes, kPairDepth) / 2, tile.rows};
  for (int64_t r = 0; r < tile.rows; r++) {
    for (int64_t l = 0; l < 2 * result.stride; l += 16) {
      const __mmask16 mask = first(tile.lanes > l ? tile.lanes - l : 0);
      const __m512 w =
          _mm512_maskz_loadu_ps(mask, tile.row(r) + l) * _mm512_maskz_loadu_ps(mask, lane_factor + l);
      const __m512i high = rounded(w);
      uint16_t* to = reinterpret_cast<uint16_t*>(out + r * result.stride) + l;
      _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(high));
      if (parts > 1)
        _mm256_storeu_si256((__m256i*)(to + 2 * result.part_stride()),
                            _mm512_cvtepi32_epi16(rounded(rest(w, high))));
    }
  }
  return result;
}

void add_product(Rounded w, bool pairs_in_line, int64_t rows, int64_t depth, PackedPairs b, int parts,
                 float* out, int64_t width) {
  PairProduct p;
  p.rows = rows;
  p.columns = width;
  p.depth = depth;
  p.a_row = pairs_in_line ? w.stride : 1;
  p.a_depth = pairs_in_line ? 1 : w.stride;
  p.panel_stride = depth * kPairPanel;
  p.c = out;
  p.c_stride = width;
  set_terms(p, parts, w.data, w.part_stride(), b);
  multiply(p);
}

void add_to_lanes(Tile<float> tile, const float* row_factor, PackedPairs y, int parts, Pair* rounded,
                  float* out, int64_t width) {
  const Rounded w = round_by_rows(tile, row_factor, parts, rounded);
  add_product(w, kPairsInLine, tile.lanes, round_up(tile.rows, kPairDepth) / 2, y, parts, out, width);
}

void add_to_rows(Tile<float> tile, const float* lane_factor, PackedPairs x, int parts, Pair* rounded,
                 float* out, int64_t width) {
  const Rounded w = round_by_lanes(tile, lane_factor, parts, rounded);
  add_product(w, true, tile.rows, round_up(tile.lanes, kPairDepth) / 2, x, parts, out, width);
}

constexpr BFloat16Kernels kTable = {load_rows, pack_rows, pack_components, logits, add_to_lanes, add_to_rows};

}  // namespace

#define FASTCL_NAME_(isa) bfloat16_kernels_##isa
#define FASTCL_NAME(isa) FASTCL_NAME_(isa)
const BFloat16Kernels* FASTCL_NAME(FASTCL_ISA)() { return &kTable; }

}  // namespace fastcl::cpu
