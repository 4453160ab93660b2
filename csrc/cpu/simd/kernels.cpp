// The tile kernels, compiled once per instruction set (FASTCL_ISA names it). No standard library:
// an inline function shared with other objects could be the copy that needs a newer machine.
#include "cpu/simd/kernels.h"

#include "cpu/simd/gemm.h"
#include "cpu/simd/log_sum.h"
#include "cpu/simd/logistic.h"
#include "cpu/simd/pairs.h"
#include "cpu/simd/soft_targets.h"

namespace fastcl::cpu {
namespace {

static_assert(kLaneUnit % kPanel<float> == 0 && kLaneUnit % kPanel<double> == 0);

// ---- loading and packing ----

template <class T, class S>
void convert_rows(T* dst, int64_t dst_stride, const S* src, int64_t src_stride, int64_t rows, int64_t width,
                  const T* factor) {
  for (int64_t r = 0; r < rows; r++) {
    const T f = factor ? factor[r] : T(1);
    for (int64_t k = 0; k < width; k++) dst[r * dst_stride + k] = static_cast<T>(src[r * src_stride + k]) * f;
    for (int64_t k = width; k < dst_stride; k++) dst[r * dst_stride + k] = 0;
  }
}

struct BFloat16 {
  uint16_t bits;
  operator float() const { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }
};

template <class T>
void load_rows(T* dst, int64_t dst_stride, const void* src, DType dtype, int64_t src_stride, int64_t rows,
               int64_t width, const T* factor) {
  auto convert = [&](auto* typed) { convert_rows(dst, dst_stride, typed, src_stride, rows, width, factor); };
  switch (dtype) {
    case DType::float64:
      return convert(static_cast<const double*>(src));
    case DType::float32:
      return convert(static_cast<const float*>(src));
    case DType::float16:
      return convert(static_cast<const Float16*>(src));
    case DType::bfloat16:
      return convert(static_cast<const BFloat16*>(src));
  }
}

template <class T>
T dot(const T* a, const T* b, int64_t width) {
  constexpr int64_t kBlock = 32 * kPanel<T>;
  Vec<T> sum = {};
  int64_t k = 0;
  while (k + kPanel<T> <= width) {
    const int64_t end = width - k < kBlock ? width : k + kBlock;
    Vec<T> acc[2] = {};
    for (; k + kPanel<T> <= end; k += kPanel<T>) {
      acc[0] += load(a + k) * load(b + k);
      acc[1] += load(a + k + kLanes<T>) * load(b + k + kLanes<T>);
    }
    sum += acc[0] + acc[1];
  }
  T total = horizontal_sum<T>(sum);
  for (; k < width; k++) total += a[k] * b[k];
  return total;
}

template <class T>
T sum(const T* x, int64_t width) {
  Vec<T> total = {};
  int64_t k = 0;
  for (; k + kLanes<T> <= width; k += kLanes<T>) total += load(x + k);
  T rest = 0;
  for (; k < width; k++) rest += x[k];
  return horizontal_sum<T>(total) + rest;
}

template <class T>
void add_scaled(T* y, const T* x, T alpha, int64_t width) {
  for (int64_t k = 0; k < width; k++) y[k] += alpha * x[k];
}

template <class T>
T row_gradient(const T* row, T factor, const T* sum, int64_t width, Chain<T> chain, T* out) {
  constexpr int64_t kBlock = 32 * kPanel<T>;
  const int64_t whole = width / kLanes<T> * kLanes<T>;
  Vec<T> total = {};
  for (int64_t first = 0; first < whole; first += kBlock) {
    const int64_t end = whole - first < kBlock ? whole : first + kBlock;
    Vec<T> block = {};
    for (int64_t k = first; k < end; k += kLanes<T>) block += load(row + k) * factor * load(sum + k);
    total += block;
  }
  T radial = horizontal_sum<T>(total);
  for (int64_t k = whole; k < width; k++) radial += row[k] * factor * sum[k];
  const T along = chain.sphere ? radial : T(0);
  auto gradient = [&](auto x, auto g) { return (g - x * factor * along) * chain.scale * chain.inverse; };
  for (int64_t k = 0; k < whole; k += kLanes<T>) store(out + k, gradient(load(row + k), load(sum + k)));
  for (int64_t k = whole; k < width; k++) out[k] = gradient(row[k], sum[k]);
  return radial;
}

// Rows are readable to whole vectors.
template <class T>
void pack_lanes(T* packed, const T* x, int64_t stride, int64_t lanes, int64_t width) {
  constexpr int64_t kSide = kLanes<T>;
  for (int64_t first = 0; first < round_up(lanes, kPanel<T>); first += kSide) {
    T* panel = packed + first / kPanel<T> * kPanel<T> * width + first % kPanel<T>;
    for (int64_t k = 0; k < width; k += kSide) {
      Vec<T> square[kSide];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; i++)
        square[i] = first + i < lanes ? load(x + (first + i) * stride + k) : Vec<T>{};
      transpose<T>(square);
      for (int64_t i = 0; i < kSide && k + i < width; i++) store(panel + (k + i) * kPanel<T>, square[i]);
    }
  }
}

// ---- products ----

template <class T>
void exclude_past_last(Tile<T> tile) {
  for (int64_t r = 0; r < tile.rows; r++)
    for (int64_t i = tile.lanes; i < vectors_of(tile) * kLanes<T>; i++) tile.row(r)[i] = excluded_logit<T>;
}

template <class T>
void logits(Tile<T> tile, const T* y, int64_t y_stride, const T* packed, int64_t width, T scale,
            const T* bias) {
  const int64_t padded = vectors_of(tile) * kLanes<T>;
  gemm<T>(tile.rows, padded, width, {y, y_stride, 1}, packed, kPanel<T>, kPanel<T> * width, tile.s,
          tile.stride, {false, scale, bias});
  exclude_past_last(tile);
}

// As many rows at a time as a vector has components, which are summed together in the end.
template <class T>
void few_logits(Tile<T> tile, const T* y, int64_t y_stride, const T* x, int64_t x_stride, int64_t width,
                T scale, const T* bias) {
  constexpr int64_t kSide = kLanes<T>;
  for (int64_t first = 0; first < tile.rows; first += kSide) {
    const int64_t last = first + kSide < tile.rows ? first + kSide : tile.rows;
    for (int64_t i = 0; i < tile.lanes; i++) {
      Vec<T> sum[kSide] = {};
      for (int64_t begin = 0; begin < width; begin += kDepth) {
        const int64_t end = begin + kDepth < width ? begin + kDepth : width;
        Vec<T> block[kSide] = {};
        for (int64_t k = begin; k < end; k += kSide) {
          const Vec<T> component = load(x + i * x_stride + k);
#pragma GCC unroll 16
          for (int64_t r = 0; r < kSide; r++)
            block[r] += load(y + (first + r < last ? first + r : first) * y_stride + k) * component;
        }
#pragma GCC unroll 16
        for (int64_t r = 0; r < kSide; r++) sum[r] += block[r];
      }
      transpose<T>(sum);
#pragma GCC unroll 4
      for (int64_t half = kSide / 2; half > 0; half /= 2)
        for (int64_t r = 0; r < half; r++) sum[r] += sum[r + half];
      for (int64_t r = first; r < last; r++)
        tile.row(r)[i] = sum[0][r - first] * scale + (bias ? bias[r] : T(0));
    }
  }
  exclude_past_last(tile);
}

template <class T>
void add_to_lanes(Tile<T> tile, const T* y, int64_t y_stride, T* out, int64_t out_stride, int64_t width) {
  gemm<T>(tile.lanes, width, tile.rows, {tile.s, 1, tile.stride}, y, y_stride, kPanel<T>, out, out_stride,
          {true, T(1), nullptr});
}

template <class T>
void add_to_rows(Tile<T> tile, const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t width) {
  gemm<T>(tile.rows, width, tile.lanes, {tile.s, tile.stride, 1}, x, x_stride, kPanel<T>, out, out_stride,
          {true, T(1), nullptr});
}

// ---- weights of the backward pass ----

template <class T>
void lane_weights(Tile<T> tile, Weight<T> lane) {
  for (int64_t v = 0; v < vectors_of(tile); v++) {
    const int64_t offset = v * kLanes<T>;
    const Vec<T> max = load(lane.max + offset), factor = load(lane.factor + offset);
    for (int64_t r = 0; r < tile.rows; r++)
      store(tile.row(r) + offset, exp2(load(tile.row(r) + offset) - max) * factor);
  }
}

template <class T>
void separate_weights(Tile<T> tile, Weight<T> lane, Weight<T> row) {
  for (int64_t r = 0; r < tile.rows; r++) {
    for (int64_t i = 0; i < vectors_of(tile) * kLanes<T>; i += kLanes<T>) {
      const Vec<T> s = load(tile.row(r) + i);
      store(tile.row(r) + i, exp2(s - load(lane.max + i)) * load(lane.factor + i) +
                                 exp2(s - splat(row.max[r])) * splat(row.factor[r]));
    }
  }
}

template <class T>
void both_weights(Tile<T> tile, Weight<T> lane, Weight<T> row) {
  T highest = excluded_logit<T>, lowest = -excluded_logit<T>;
  auto widen = [&](T max) {
    highest = maximum(highest, max);
    lowest = is_empty(max) ? lowest : minimum(lowest, max);
  };
  for (int64_t i = 0; i < tile.lanes; i++) widen(lane.max[i]);
  for (int64_t r = 0; r < tile.rows; r++) widen(row.max[r]);
  if (highest - lowest > kSharedRange<T>) return separate_weights(tile, lane, row);
  const Vec<T> reference = splat(highest), bound = splat(2 * kSharedRange<T>);
  alignas(64) T lane_factor[kMaxTile];
  const int64_t padded = vectors_of(tile) * kLanes<T>;
  for (int64_t i = 0; i < padded; i += kLanes<T>)
    store(lane_factor + i, load(lane.factor + i) * exp2(minimum(reference - load(lane.max + i), bound)));
  for (int64_t r = 0; r < tile.rows; r++) {
    const Vec<T> factor = exp2(minimum(reference - splat(row.max[r]), bound)) * splat(row.factor[r]);
    T* s = tile.row(r);
    for (int64_t i = 0; i < padded; i += kLanes<T>)
      store(s + i, exp2(load(s + i) - reference) * (load(lane_factor + i) + factor));
  }
}

template <class T>
void pair_weights(Tile<T> tile, Tile<T> positive, const typename Kernels<T>::PairWeight* lane,
                  const typename Kernels<T>::PairWeight* row) {
  const Vec<T> zero = {};
  for (int64_t r = 0; r < tile.rows; r++) {
    for (int64_t i = 0; i < vectors_of(tile) * kLanes<T>; i += kLanes<T>) {
      const Vec<T> negative = load(tile.row(r) + i), p = load(positive.row(r) + i);
      const auto is_positive = p != empty_vector<T>();
      auto weigh = [&](Vec<T> max, Vec<T> factor, Vec<T> positive_max, Vec<T> positive_factor,
                       Vec<T> constant) {
        const Vec<T> weight = exp2(is_positive ? p - positive_max : negative - max);
        return weight * (is_positive ? positive_factor : factor) + (is_positive ? constant : zero);
      };
      Vec<T> w =
          weigh(load(lane->negative.max + i), load(lane->negative.factor + i), load(lane->positive.max + i),
                load(lane->positive.factor + i), load(lane->constant + i));
      if (row)
        w += weigh(splat(row->negative.max[r]), splat(row->negative.factor[r]), splat(row->positive.max[r]),
                   splat(row->positive.factor[r]), splat(row->constant[r]));
      store(tile.row(r) + i, w);
    }
  }
}

template <class T>
void join_logits(Tile<T> to, Tile<T> tile, const T* positive) {
  for (int64_t r = 0; r < tile.rows; r++) {
    for (int64_t i = 0; i < vectors_of(tile) * kLanes<T>; i += kLanes<T>) {
      const Vec<T> logit = load(tile.row(r) + i);
      store(to.row(r) + i, positive ? maximum(logit, load(positive + r * tile.stride + i)) : logit);
    }
  }
}

template <class T>
double weighted_sum(Tile<T> weight, Tile<T> logit, const T* bias) {
  double total = 0;
  for (int64_t r = 0; r < weight.rows; r++) {
    const Vec<T> offset = splat(bias ? bias[r] : T(0));
    Vec<T> sum = {};
    for (int64_t i = 0; i < vectors_of(weight) * kLanes<T>; i += kLanes<T>)
      sum += load(weight.row(r) + i) * (load(logit.row(r) + i) - offset);
    total += horizontal_sum<T>(sum);
  }
  return total;
}

template <class T>
void lane_quantile(Tile<T> tile, int64_t rank, T* value) {
  constexpr int kHalvings = 12;  // of the range; few enough that equal rows stay above the result
  for (int64_t offset = 0; offset < tile.lanes; offset += kLanes<T>) {
    Vec<T> low = load(tile.s + offset), high = low;
    for (int64_t r = 1; r < tile.rows; r++) {
      const Vec<T> s = load(tile.row(r) + offset);
      low = minimum(low, s);
      high = maximum(high, s);
    }
    low -= (high - low) + T(1e-3) * maximum(high, -high);
    for (int halving = 0; halving < kHalvings; halving++) {
      const Vec<T> middle = T(0.5) * (low + high);
      Vec<T> above = {};
      for (int64_t r = 0; r < tile.rows; r++)
        above += load(tile.row(r) + offset) > middle ? splat(T(1)) : Vec<T>{};
      low = above >= static_cast<T>(rank) ? middle : low;
      high = above >= static_cast<T>(rank) ? high : middle;
    }
    for (int64_t i = 0; i < kLanes<T> && offset + i < tile.lanes; i++) value[offset + i] = low[i];
  }
}

template <class T>
int64_t select_above(Tile<T> tile, const T* threshold, Selected<T> selected) {
  int64_t count = 0;
  for (int64_t r = 0; r < tile.rows; r++) {
    for (int64_t v = 0; v < vectors_of(tile); v++) {
      const int64_t offset = v * kLanes<T>;
      uint32_t above = not_at_most(load(tile.row(r) + offset), load(threshold + offset));
      for (; above; above &= above - 1) {
        const int64_t i = offset + __builtin_ctz(above);
        selected.value[count] = tile.row(r)[i];
        selected.place[2 * count] = static_cast<int32_t>(r);
        selected.place[2 * count + 1] = static_cast<int32_t>(i);
        count++;
      }
    }
  }
  return count;
}

template <class T>
constexpr Kernels<T> kTable = {
    kLanes<T>,
    kPanel<T>,
    load_rows<T>,
    dot<T>,
    sum<T>,
    add_scaled<T>,
    row_gradient<T>,
    pack_lanes<T>,
    logits<T>,
    few_logits<T>,
    add_to_lanes<T>,
    add_to_rows<T>,
    exclude<T>,
    exclude_different<T>,
    split<T>,
    split_members<T>,
    lane_max<T>,
    lane_log_sum<T>,
    both_log_sum<T>,
    row_log_sum<T>,
    add_biases<T>,
    rescale<T>,
    exponentiate<T>,
    lane_weights<T>,
    both_weights<T>,
    pair_weights<T>,
    join_logits<T>,
    weighted_sum<T>,
    logistic_sums<T>,
    logistic_weights<T>,
    add_lane_sums<T>,
    soften<T>,
    add_distances<T>,
    add_softmax<T>,
    softmax_less_target<T>,
    lane_quantile<T>,
    select_above<T>,
};

}  // namespace

#define FASTCL_NAME_(type, isa) kernels_##type##_##isa
#define FASTCL_NAME(type, isa) FASTCL_NAME_(type, isa)
const Kernels<float>* FASTCL_NAME(float, FASTCL_ISA)() { return &kTable<float>; }
const Kernels<double>* FASTCL_NAME(double, FASTCL_ISA)() { return &kTable<double>; }

}  // namespace fastcl::cpu
