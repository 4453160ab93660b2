// The three products of a tile, of all numbers of rows and lanes that end within a block.
#include "cpu/test/data.h"
#include "cpu/test/harness.h"
#include "cpu/test/tests.h"

namespace fastcl::cpu {
namespace {

template <class T>
Exact dot_of(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t count) {
  Exact sum;
  for (int64_t i = 0; i < count; i++) sum.add(double(a[i * a_step]) * b[i * b_step]);
  return sum;
}
template <class T>
double unit_of(const Exact& sum, int64_t terms) {
  return kEpsilon<T> * ((2 + std::sqrt(double(terms))) * sum.size + 1);
}

template <class T>
class Case {
 public:
  Case(int64_t rows, int64_t lanes, int64_t width) : rows_(rows), lanes_(lanes), width_(width) {
    for (int64_t r = 0; r < rows; r++) bias_.row(0)[r] = T(r) / 4 - 2;
  }

  void check_logits() {
    const Matrix<T> packed{1, 1, round_up(lanes_, k_.panel) * width_};
    k_.pack_lanes(packed.row(0), x_.row(0), x_.stride, lanes_, width_);
    for (const T* bias : {static_cast<const T*>(nullptr), static_cast<const T*>(bias_.row(0))}) {
      k_.logits(tile_, y_.row(0), y_.stride, packed.row(0), width_, kScale, bias);
      compare("logits", bias);
      k_.few_logits(tile_, y_.row(0), y_.stride, x_.row(0), x_.stride, round_up(width_, k_.vector), kScale,
                    bias);
      compare("few_logits", bias);
    }
  }

  void check_sums() {
    const Matrix<T> weights = random_.matrix<T>(rows_, tile_.stride);
    const Tile<T> tile{weights.row(0), tile_.stride, rows_, lanes_};
    Matrix<T> of_lanes{lanes_, width_, x_.stride}, of_rows{rows_, width_, y_.stride};
    std::fill_n(of_lanes.row(0), lanes_ * x_.stride, T(1));
    std::fill_n(of_rows.row(0), rows_ * y_.stride, T(1));
    k_.add_to_lanes(tile, y_.row(0), y_.stride, of_lanes.row(0), of_lanes.stride, y_.stride);
    k_.add_to_rows(tile, x_.row(0), x_.stride, of_rows.row(0), of_rows.stride, x_.stride);
    Worst lanes, rows;
    for (int64_t d = 0; d < width_; d++) {
      for (int64_t i = 0; i < lanes_; i++) {
        const Exact sum = dot_of(tile.s + i, tile.stride, y_.row(0) + d, y_.stride, rows_);
        lanes.add(of_lanes.row(i)[d], sum.value + 1, unit_of<T>(sum, rows_));
      }
      for (int64_t r = 0; r < rows_; r++) {
        const Exact sum = dot_of(tile.row(r), 1, x_.row(0) + d, x_.stride, lanes_);
        rows.add(of_rows.row(r)[d], sum.value + 1, unit_of<T>(sum, lanes_));
      }
    }
    check("add_to_lanes", lanes.error, 1);
    check("add_to_rows", rows.error, 1);
  }

 private:
  static constexpr T kScale = T(1.75);

  void compare(const char* what, const T* bias) {
    Worst worst;
    int64_t not_excluded = 0;
    for (int64_t r = 0; r < rows_; r++) {
      for (int64_t i = 0; i < lanes_; i++) {
        const Exact sum = dot_of(y_.row(r), 1, x_.row(i), 1, width_);
        worst.add(tile_.row(r)[i], kScale * sum.value + (bias ? bias[r] : T(0)),
                  2 * unit_of<T>(sum, width_) + 8 * kEpsilon<T>);
      }
      for (int64_t i = lanes_; i < round_up(lanes_, k_.vector); i++)
        not_excluded += tile_.row(r)[i] != excluded_logit<T>;
    }
    check(what, worst.error, 1);
    check("lanes past the last are excluded", double(not_excluded), 0);
  }

  const Kernels<T>& k_ = kernels<T>();
  Random random_{7};
  const int64_t rows_, lanes_, width_;
  const Matrix<T> y_ = random_.matrix<T>(rows_, width_), x_ = random_.matrix<T>(lanes_, width_);
  const Matrix<T> memory_{rows_, lanes_, round_up(lanes_, kLaneUnit)}, bias_{1, rows_, rows_};
  const Tile<T> tile_{memory_.row(0), memory_.stride, rows_, lanes_};
};

template <class T>
void check_case(int64_t rows, int64_t lanes, int64_t width) {
  Case<T> one(rows, lanes, width);
  one.check_logits();
  one.check_sums();
}

template <class T>
void check_type() {
  const int64_t vector = kernels<T>().vector, panel = kernels<T>().panel;
  for (int64_t rows = 1; rows <= 26; rows++) check_case<T>(rows, panel + 1, vector + 1);
  for (int64_t lanes = 1; lanes <= 2 * panel + 1; lanes++) check_case<T>(5, lanes, vector + 1);
  for (int64_t width = 1; width <= 2 * panel + 1; width++) check_case<T>(5, vector + 1, width);
  // sums of more than one block
  check_case<T>(140, 5, 5);
  check_case<T>(5, 140, 5);
  check_case<T>(5, 5, 300);
}

}  // namespace

void check_products() {
  check_type<float>();
  check_type<double>();
}

}  // namespace fastcl::cpu
