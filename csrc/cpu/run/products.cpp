#include "cpu/run/products.h"

#include <type_traits>

namespace fastcl::cpu {

namespace {

template <class T>
class ProductsInT : public Products<T> {
 public:
  ProductsInT(const Problem<T>& problem, int64_t max_lanes, Scratch& scratch)
      : problem_(problem), scratch_(scratch), width_(round_up(problem.query.width, k_.vector)) {
    packed_ = scratch.take<T>(kPackedSlot, max_lanes * problem.query.width);
    scaled_ = scratch.take<T>(kLaneSlot, max_lanes * width_);
  }

  void set_lanes(int64_t begin, int64_t count) override {
    lanes_ = count;
    first_lane_ = lane_data_ = problem_.query.row(begin);
    lane_stride_ = problem_.query.stride;
    is_packed_ = false;
  }
  void set_rows(int64_t begin, int64_t count) override {
    row_begin_ = begin;
    row_data_ = problem_.key.tile(begin, count, kKeySlot, scratch_, &row_stride_);
  }
  void scale_lanes(const T* factor) override {
    for (int64_t i = 0; i < lanes_; i++)
      for (int64_t d = 0; d < width_; d++)
        scaled_[i * width_ + d] = lane_data_[i * lane_stride_ + d] * factor[i];
    lane_data_ = scaled_;
    lane_stride_ = width_;
  }

  void logits(Tile<T> tile) override {
    const T* bias = problem_.bias2 ? problem_.bias2 + row_begin_ : nullptr;
    // a pair of a symmetric problem is to be rounded alike in both its places
    if (lanes_ <= kFewLanes && !problem_.symmetric)
      return k_.few_logits(tile, row_data_, row_stride_, first_lane_, problem_.query.stride, width_,
                           problem_.scale2, bias);
    if (!is_packed_) k_.pack_lanes(packed_, first_lane_, problem_.query.stride, lanes_, problem_.query.width);
    is_packed_ = true;
    k_.logits(tile, row_data_, row_stride_, packed_, problem_.query.width, problem_.scale2, bias);
  }
  void add_to_lanes(Tile<T> tile, T* out) override {
    k_.add_to_lanes(tile, row_data_, row_stride_, out, width_, width_);
  }
  void add_to_rows(Tile<T> tile, T* out) override {
    k_.add_to_rows(tile, lane_data_, lane_stride_, out, width_, width_);
  }

 private:
  static constexpr int64_t kFewLanes = 2;  // whose vectors would be all but empty

  const Kernels<T>& k_ = kernels<T>();
  const Problem<T>& problem_;
  Scratch& scratch_;
  const int64_t width_;
  T *packed_, *scaled_;
  const T *first_lane_ = nullptr, *lane_data_ = nullptr, *row_data_ = nullptr;
  int64_t lanes_ = 0, row_begin_ = 0, lane_stride_ = 0, row_stride_ = 0;
  bool is_packed_ = false;
};

class ProductsOfPairs : public Products<float> {
 public:
  ProductsOfPairs(const Problem<float>& problem, int64_t max_rows, int64_t max_lanes, Scratch& scratch)
      : problem_(problem),
        parts_(problem.bfloat16.parts),
        depth_(problem.bfloat16.query.depth),
        width_(round_up(problem.query.width, kernels<float>().vector)) {
    max_rows = round_up(max_rows, kPairDepth);
    max_lanes = round_up(max_lanes, kPairPanel);
    auto packed = [&](int slot, int64_t rows) {
      return PackedPairs{scratch.take<Pair>(slot, parts_ * rows * depth_ / 2), rows * depth_ / 2};
    };
    lanes_by_row_ = packed(kPackedSlot, max_lanes);
    lanes_by_component_ = packed(kLaneSlot, max_lanes);
    rows_by_component_ = packed(kKeySlot, max_rows);
    const int64_t rounded = parts_ * max_rows * max_lanes / 2;
    rounded_ = scratch.take<Pair>(kRoundedSlot, rounded + 2 * max_lanes);
    logit_factor_ = reinterpret_cast<float*>(rounded_ + rounded);
    lane_factor_ = logit_factor_ + max_lanes;
  }

  void set_lanes(int64_t begin, int64_t count) override {
    lanes_ = rows_from(problem_.bfloat16.query, begin);
    lane_count_ = count;
    packed_by_row_ = lanes_by_component_packed_ = false;
    for (int64_t i = 0; i < round_up(count, kLaneUnit); i++) {
      lane_factor_[i] = i < count ? lanes_.factor[i] : 0.0f;
      logit_factor_[i] = lane_factor_[i];
    }
  }
  void set_rows(int64_t begin, int64_t count) override {
    rows_ = rows_from(problem_.bfloat16.key, begin);
    row_begin_ = begin;
    row_count_ = count;
    rows_packed_ = false;
  }
  void scale_lanes(const float* factor) override {
    for (int64_t i = 0; i < lane_count_; i++) lane_factor_[i] = lanes_.factor[i] * factor[i];
  }

  void logits(Tile<float> tile) override {
    if (!packed_by_row_) k_.pack_rows(lanes_by_row_, lanes_, parts_, lane_count_);
    packed_by_row_ = true;
    k_.logits(tile, rows_, lanes_by_row_, parts_, logit_factor_, problem_.scale2,
              problem_.bias2 ? problem_.bias2 + row_begin_ : nullptr);
  }
  void add_to_lanes(Tile<float> tile, float* out) override {
    if (!rows_packed_) k_.pack_components(rows_by_component_, rows_, parts_, row_count_);
    rows_packed_ = true;
    k_.add_to_lanes(tile, rows_.factor, rows_by_component_, parts_, rounded_, out, width_);
  }
  void add_to_rows(Tile<float> tile, float* out) override {
    if (!lanes_by_component_packed_) k_.pack_components(lanes_by_component_, lanes_, parts_, lane_count_);
    lanes_by_component_packed_ = true;
    k_.add_to_rows(tile, lane_factor_, lanes_by_component_, parts_, rounded_, out, width_);
  }

 private:
  static BFloat16Rows rows_from(BFloat16Rows x, int64_t begin) {
    return {x.row(begin), x.stride, x.depth, x.factor + begin};
  }

  const BFloat16Kernels& k_ = *bfloat16_kernels();
  const Problem<float>& problem_;
  const int parts_;
  const int64_t depth_, width_;
  BFloat16Rows lanes_, rows_;
  int64_t lane_count_ = 0, row_begin_ = 0, row_count_ = 0;
  PackedPairs lanes_by_row_, lanes_by_component_, rows_by_component_;
  bool packed_by_row_ = false, lanes_by_component_packed_ = false, rows_packed_ = false;
  Pair* rounded_;
  float *logit_factor_, *lane_factor_;
};

}  // namespace

template <class T>
std::unique_ptr<Products<T>> make_products(const Problem<T>& problem, int64_t max_rows, int64_t max_lanes,
                                           Scratch& scratch) {
  if constexpr (std::is_same_v<T, float>)
    if (problem.bfloat16.parts)
      return std::make_unique<ProductsOfPairs>(problem, max_rows, max_lanes, scratch);
  return std::make_unique<ProductsInT<T>>(problem, max_lanes, scratch);
}

template std::unique_ptr<Products<float>> make_products<float>(const Problem<float>&, int64_t, int64_t,
                                                               Scratch&);
template std::unique_ptr<Products<double>> make_products<double>(const Problem<double>&, int64_t, int64_t,
                                                                 Scratch&);

}  // namespace fastcl::cpu
