// What is summed over the lanes and rows of a tile, and the weights made of it.
#include "cpu/test/data.h"
#include "cpu/test/harness.h"
#include "cpu/test/tests.h"

namespace fastcl::cpu {
namespace {

template <class T>
struct RunningSums {
  int64_t count;
  Buffer<T> max = allocate_filled<T>(count + kMaxTile, excluded_logit<T>);
  Buffer<T> sum = allocate_filled<T>(count + kMaxTile, T(0));
  Buffer<T> rest = allocate_filled<T>(count + kMaxTile, T(0));

  LogSum<T> state() const { return {max.get(), {sum.get(), rest.get()}}; }
};

template <class T>
class Case {
 public:
  Case(int64_t rows, int64_t lanes, double range)
      : rows_(rows), lanes_(lanes), range_(range), logits_(random_.matrix<T>(rows, lanes, range)) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = lanes; i < memory_.stride; i++) memory_.row(r)[i] = excluded_logit<T>;
  }

  // Twice over the tile, as over two tiles.
  void check_log_sums() {
    const RunningSums<T> lane{lanes_}, row{rows_}, both_lane{lanes_}, both_row{rows_};
    for (int pass = 0; pass < 2; pass++) {
      k_.lane_log_sum(fill(), lane.state());
      k_.row_log_sum(fill(), row.state());
      k_.both_log_sum(fill(), both_lane.state(), both_row.state());
    }
    auto of_lane = [&](int64_t i, int64_t r) { return double(logits_.row(r)[i]); };
    auto of_row = [&](int64_t r, int64_t i) { return double(logits_.row(r)[i]); };
    compare("lane_log_sum", lane, rows_, of_lane);
    compare("row_log_sum", row, lanes_, of_row);
    compare("both_log_sum, lanes", both_lane, rows_, of_lane);
    compare("both_log_sum, rows", both_row, lanes_, of_row);
    check_weights(lane, row);
  }

  void check_rescale() {
    const Tile<T> tile = fill();
    tile.row(0)[0] = excluded_logit<T>;
    tile.row(rows_ - 1)[lanes_ - 1] = T(NAN);
    std::vector<T> memory(rows_ * tile.stride);
    const Tile<T> to{memory.data(), tile.stride, rows_, lanes_};
    k_.rescale(to, tile, T(0.25));
    int64_t wrong = 0;
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t i = 0; i < lanes_; i++) {
        const T from = tile.row(r)[i], got = to.row(r)[i];
        wrong += std::isnan(from) ? !std::isnan(got) : got != (is_empty(from) ? from : from * T(0.25));
      }
    check("rescale", double(wrong), 0);
  }

  void check_logistic() {
    const Buffer<T> bias = allocate_filled<T>(lanes_ + kMaxTile, T(0.5)),
                    zero = allocate_filled<T>(kMaxTile, T(0));
    const RunningSums<T> negative{lanes_}, positive{lanes_}, both{lanes_};
    k_.logistic_sums(fill(), nullptr, bias.get(), negative.state().sum, positive.state().sum);
    check_softplus("logistic_sums", negative.state().sum);
    const Tile<T> tile = fill();
    k_.logistic_weights(tile, nullptr, bias.get(), bias.get(), zero.get(), both.state().sum);
    check_softplus("logistic_weights, total", both.state().sum);
    Worst worst;
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t i = 0; i < lanes_; i++) {
        const double exact = 0.5 / (1 + std::exp2(-(logits_.row(r)[i] + 0.5)));
        worst.add(tile.row(r)[i], exact, kEpsilon<T> * 8 * exact + kSmallest);
      }
    check("logistic_weights", worst.error, 1);
  }

  void check_softplus(const char* name, Sum<T> sums) {
    Worst worst;
    for (int64_t i = 0; i < lanes_; i++) {
      Exact sum;
      for (int64_t r = 0; r < rows_; r++) sum.add(softplus2(logits_.row(r)[i] + 0.5));
      worst.add((sums + i).total(), sum.value, kEpsilon<T> * 8 * sum.size + rows_ * kSmallest);
    }
    check(name, worst.error, 1);
  }

  void check_selection() {
    const Tile<T> tile = fill();
    tile.row(rows_ / 2)[lanes_ - 1] = T(NAN);
    const Buffer<T> threshold = allocate_filled<T>(lanes_ + kMaxTile, T(range_ / 4));
    std::vector<T> value(rows_ * tile.stride);
    std::vector<int32_t> place(2 * value.size());
    const int64_t count = k_.select_above(tile, threshold.get(), {value.data(), place.data()});
    int64_t exact = 0, wrong = 0;
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t i = 0; i < lanes_; i++) {
        if (tile.row(r)[i] <= threshold[i]) continue;
        const T got = value[exact], expected = tile.row(r)[i];
        wrong += place[2 * exact] != r || place[2 * exact + 1] != i;
        wrong += std::isnan(expected) ? !std::isnan(got) : got != expected;
        exact++;
      }
    check("select_above, how many", std::abs(double(count - exact)), 0);
    check("select_above", double(wrong), 0);
  }

 private:
  static constexpr double kSmallest = std::numeric_limits<T>::min();  // below it exp2 is 0

  static double softplus2(double x) {
    return std::max(x, 0.0) + std::log1p(std::exp2(-std::abs(x))) / std::log(2.0);
  }

  Tile<T> fill() {
    for (int64_t r = 0; r < rows_; r++) std::copy_n(logits_.row(r), lanes_, memory_.row(r));
    return {memory_.row(0), memory_.stride, rows_, lanes_};
  }

  template <class Logit>
  void compare(const char* what, const RunningSums<T>& got, int64_t terms, const Logit& logit) {
    Worst max, sum;
    for (int64_t i = 0; i < got.count; i++) {
      double highest = -INFINITY, exact = 0;
      for (int64_t j = 0; j < terms; j++) highest = std::max(highest, logit(i, j));
      for (int64_t j = 0; j < terms; j++) exact += 2 * std::exp2(logit(i, j) - highest);
      max.add(got.max[i], highest, 1);
      sum.add((got.state().sum + i).total(), exact, kEpsilon<T> * 8 * exact);
    }
    check(what, max.error, 0);
    check(what, sum.error, 1);
  }

  // 1 / sum as factors: what softmax's backward pass takes.
  void check_weights(const RunningSums<T>& lane, const RunningSums<T>& row) {
    for (int64_t i = 0; i < lanes_; i++) lane.sum[i] = 1 / lane.sum[i];
    for (int64_t r = 0; r < rows_; r++) row.sum[r] = 1 / row.sum[r];
    const Weight<T> of_lane{lane.max.get(), lane.sum.get()}, of_row{row.max.get(), row.sum.get()};
    auto softmax = [&](const RunningSums<T>& side, int64_t i, T logit) {
      return std::exp2(double(logit) - side.max[i]) * side.sum[i];
    };
    Worst one, two;
    const Tile<T> tile = fill();
    k_.lane_weights(tile, of_lane);
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t i = 0; i < lanes_; i++) {
        const double exact = softmax(lane, i, logits_.row(r)[i]);
        one.add(tile.row(r)[i], exact, kEpsilon<T> * 4 * exact + kSmallest);
      }
    check("lane_weights", one.error, 1);
    fill();
    k_.both_weights(tile, of_lane, of_row);
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t i = 0; i < lanes_; i++) {
        const double exact = softmax(lane, i, logits_.row(r)[i]) + softmax(row, r, logits_.row(r)[i]);
        two.add(tile.row(r)[i], exact, kEpsilon<T> * 8 * exact + 0x1p24 * kSmallest);  // of a shared maximum
      }
    check("both_weights", two.error, 1);
  }

  const Kernels<T>& k_ = kernels<T>();
  Random random_{11};
  const int64_t rows_, lanes_;
  const double range_;
  const Matrix<T> logits_;
  const Matrix<T> memory_{rows_, lanes_, round_up(lanes_, kLaneUnit)};
};

template <class T>
void check_case(int64_t rows, int64_t lanes, double range) {
  Case<T> one(rows, lanes, range);
  one.check_log_sums();
  one.check_rescale();
  one.check_logistic();
  one.check_selection();
}

template <class T>
void check_type() {
  for (const double range : {10, 300}) {  // within one reference, and beyond
    for (int64_t rows = 1; rows <= 18; rows++) check_case<T>(rows, 5, range);
    for (int64_t lanes = 1; lanes <= 2 * kernels<T>().panel + 1; lanes++) check_case<T>(3, lanes, range);
    check_case<T>(200, 190, range);
  }
}

}  // namespace

void check_sums() {
  check_type<float>();
  check_type<double>();
}

}  // namespace fastcl::cpu
