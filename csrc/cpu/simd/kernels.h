// What one instruction set offers: kernels over one tile of the similarity matrix.
//
// A tile is stored as s[row][lane]: rows are keys, lanes are queries, so that statistics of a query
// are vertical and need no shuffles. Logits are in log2 units: exp2 serves everywhere.
#pragma once

#include <cstdint>

// What files of several instruction sets share may not become a symbol: of copies under one name the linker
// keeps any, also that of the newest instructions.
#define FASTCL_ALWAYS_INLINE __attribute__((always_inline)) inline

namespace fastcl::cpu {

namespace {  // a copy per instruction set
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
}  // namespace

constexpr int64_t kMaxTile = 256;  // rows or lanes
constexpr int64_t kLaneUnit = 32;  // lanes are multiples of it: whole panels at every level

enum class DType : int { float64, float32, float16, bfloat16 };

// Stands for "no such pair": far below every logit, yet finite, so that no arithmetic on it makes a NaN.
template <class T>
constexpr T excluded_logit = sizeof(T) == 4 ? T(-1e38) : T(-1e300);
template <class T>
FASTCL_ALWAYS_INLINE constexpr bool is_empty(T maximum) {
  return maximum <= excluded_logit<T> / 2;
}

// A running sum and what rounding has left out of it, so that its error does not grow with its length.
template <class T>
struct Sum {
  T* sum;
  T* rest;

  FASTCL_ALWAYS_INLINE T total() const {
    return *rest - *rest == 0 ? *sum + *rest : *sum;
  }  // a sum that is not finite has no rest
  FASTCL_ALWAYS_INLINE Sum operator+(int64_t i) const { return {sum + i, rest + i}; }
};

// Running max and sum of exp2(logit - max), per lane or per row.
template <class T>
struct LogSum {
  T* max;
  Sum<T> sum;

  FASTCL_ALWAYS_INLINE T total() const { return sum.total(); }
};

// Sum and number of the positives, per lane or per row.
template <class T>
struct PositiveSums {
  static constexpr int kArrays = 3;
  Sum<T> sum = {};
  T* count = nullptr;

  // One array after the other, each of `stride` entries.
  static FASTCL_ALWAYS_INLINE PositiveSums over(T* memory, int64_t stride) {
    return {{memory, memory + stride}, memory + 2 * stride};
  }
};

// Weight exp2(logit - max) * factor, per lane or per row.
template <class T>
struct Weight {
  const T* max;
  const T* factor;
};

template <class T>
struct Tile {
  T* s;
  int64_t stride;
  int64_t rows;
  int64_t lanes;  // real lanes; the kernels work on whole vectors and ignore the rest

  FASTCL_ALWAYS_INLINE T* row(int64_t r) const { return s + r * stride; }
};

// Where the pairs of a tile go, which strides as they do; `negative` may be the tile itself.
template <class T>
struct Split {
  Tile<T> negative, positive;
};

// Positive pairs of a tile, told by their ids.
struct Ids {
  const int64_t* row = nullptr;
  const int64_t* lane = nullptr;
};

// Pairs picked from a tile: their logits, and their row and lane in turn.
template <class T>
struct Selected {
  T* value;
  int32_t* place;
};

// From the gradient g of a unit row to that of the input: scale * inverse * (g - unit * <unit, g>), or
// without the second term where the input's length counts (`sphere` is false).
template <class T>
struct Chain {
  T scale, inverse;
  bool sphere;
};

template <class T>
struct Kernels {
  int64_t vector;  // lanes per vector; widths are padded to it
  int64_t panel;   // lanes per packed panel

  // Converts rows to T, multiplies each by its factor (null: 1) and pads with zeros to the stride of dst.
  void (*load_rows)(T* dst, int64_t dst_stride, const void* src, DType dtype, int64_t src_stride,
                    int64_t rows, int64_t width, const T* factor);
  T (*dot)(const T* a, const T* b, int64_t width);
  T (*sum)(const T* x, int64_t width);
  // y += alpha * x
  void (*add_scaled)(T* y, const T* x, T alpha, int64_t width);
  // Gradient of an input row from `sum`, that of its unit row, which is `factor` times `row`; returns
  // <unit row, sum>. `out` may be `sum`.
  T (*row_gradient)(const T* row, T factor, const T* sum, int64_t width, Chain<T> chain, T* out);

  // Packs rows of x as the lanes of a tile.
  void (*pack_lanes)(T* packed, const T* x, int64_t stride, int64_t lanes, int64_t width);
  // tile = scale y x^T + bias (null: 0), bias per row; lanes past the last are excluded.
  void (*logits)(Tile<T> tile, const T* y, int64_t y_stride, const T* packed, int64_t width, T scale,
                 const T* bias);
  // The same of few lanes, whose rows are as they are, like y padded to whole vectors with zeros.
  void (*few_logits)(Tile<T> tile, const T* y, int64_t y_stride, const T* x, int64_t x_stride, int64_t width,
                     T scale, const T* bias);
  // lane_out += tile^T y
  void (*add_to_lanes)(Tile<T> tile, const T* y, int64_t y_stride, T* out, int64_t out_stride, int64_t width);
  // row_out += tile x
  void (*add_to_rows)(Tile<T> tile, const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t width);

  // The pairs of equal ids, or of different ones.
  void (*exclude)(Tile<T> tile, Ids ids);
  void (*exclude_different)(Tile<T> tile, Ids ids);
  // Each pair's logit goes to one of the two tiles, the other excludes the pair; adds the positives' sums and
  // counts (null: not).
  void (*split)(Tile<T> tile, Split<T> to, Ids ids, PositiveSums<T> lane, PositiveSums<T> row);

  // The same, positives told by a byte each, which stride as the tile.
  void (*split_members)(Tile<T> tile, Split<T> to, const uint8_t* members, PositiveSums<T> lane,
                        PositiveSums<T> row);

  void (*lane_max)(Tile<T> tile, T* max);
  void (*lane_log_sum)(Tile<T> tile, LogSum<T> lane);
  void (*both_log_sum)(Tile<T> tile, LogSum<T> lane, LogSum<T> row);
  void (*row_log_sum)(Tile<T> tile, LogSum<T> row);
  // to = tile + bias of the lane (null: 0) + bias of the row (null: 0); of tiles that stride alike
  void (*add_biases)(Tile<T> to, Tile<T> tile, const T* lane, const T* row);
  // to = tile * factor, where pairs are not excluded; of tiles that stride alike
  void (*rescale)(Tile<T> to, Tile<T> tile, T factor);
  // tile = exp2(tile - max), sum += its lane sums
  void (*exponentiate)(Tile<T> tile, const T* max, T* sum);

  // tile = weight of the lane (+ weight of the row)
  void (*lane_weights)(Tile<T> tile, Weight<T> lane);
  void (*both_weights)(Tile<T> tile, Weight<T> lane, Weight<T> row);
  // The same where a pair may be positive: tile holds the negatives, `positive` the positives;
  // constants are added on positives. row may be null.
  struct PairWeight {
    Weight<T> negative, positive;
    const T* constant;
  };
  void (*pair_weights)(Tile<T> tile, Tile<T> positive, const PairWeight* lane, const PairWeight* row);

  // to = the logits of both, each pair's being excluded in one of them; `positive` may be null
  void (*join_logits)(Tile<T> to, Tile<T> tile, const T* positive);
  // sum of weight * (logit - bias of the row), bias may be null; of tiles that stride alike
  double (*weighted_sum)(Tile<T> weight, Tile<T> logit, const T* bias);

  // Adds each lane's sum of softplus(logit + bias) over its negatives, and of softplus(-logit - bias) over
  // its positives, in log2 units; `positive`, which strides as the tile, may be null.
  void (*logistic_sums)(Tile<T> tile, const T* positive, const T* bias, Sum<T> negatives, Sum<T> positives);
  // tile = sigmoid(logit + bias) * factor on negatives, sigmoid(-logit - bias) * factor on positives; where
  // `total` is given, it receives the sums of softplus of both
  void (*logistic_weights)(Tile<T> tile, const T* positive, const T* bias, const T* negative_factor,
                           const T* positive_factor, Sum<T> total);
  // out += the lanes' sums
  void (*add_lane_sums)(Tile<T> tile, T* out);

  // Of two softmaxes over the rows; what is given beside a tile strides as the tile.
  // As lane_log_sum, and out = exp2(tile - max); decay = exp2(max before - max).
  void (*soften)(Tile<T> tile, LogSum<T> lane, T* decay, T* out);
  // sum = sum * decay + shift + the lanes' sums of weight * (max - logit)
  void (*add_distances)(Tile<T> logit, const T* weight, const T* max, const T* shift, const T* decay,
                        Sum<T> sum);
  // out += exp2(tile - max) * factor; `first`: out holds nothing yet
  void (*add_softmax)(Tile<T> tile, Weight<T> lane, T* out, bool first);
  // out = (exp2(tile - max) * factor - target) * gradient of the lane
  void (*softmax_less_target)(Tile<T> tile, Weight<T> lane, const T* target, const T* gradient, T* out);

  // A value per lane, near its quantile, that at least `rank` of its rows lie above.
  void (*lane_quantile)(Tile<T> tile, int64_t rank, T* value);
  // Lists the pairs whose logit is above the threshold of their lane (NaN counts as above).
  int64_t (*select_above)(Tile<T> tile, const T* threshold, Selected<T> selected);
};

// Each is defined by kernels.cpp, compiled once per instruction set.
const Kernels<float>* kernels_float_generic();
const Kernels<float>* kernels_float_avx2();
const Kernels<float>* kernels_float_avx512();
const Kernels<float>* kernels_float_neon();
const Kernels<double>* kernels_double_generic();
const Kernels<double>* kernels_double_avx2();
const Kernels<double>* kernels_double_avx512();
const Kernels<double>* kernels_double_neon();

}  // namespace fastcl::cpu
