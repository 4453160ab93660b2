// Rows on their way in: conversions, and sums of any width.
#include <cstring>

#include "cpu/test/data.h"
#include "cpu/test/harness.h"
#include "cpu/test/tests.h"

namespace fastcl::cpu {
namespace {

double value_of_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(mantissa, -24)
                                      : std::ldexp(mantissa + 1024, exponent - 25);
  return bits >> 15 ? -size : size;
}
double value_of_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// All values of 16 bits, in rows of `width`.
template <class T>
void check_halves(DType dtype, double (*value_of)(uint16_t), const char* what, int64_t width) {
  constexpr int64_t kValues = 1 << 16;
  std::vector<uint16_t> bits(kValues);
  for (int64_t i = 0; i < kValues; i++) bits[i] = static_cast<uint16_t>(i);
  const int64_t rows = kValues / width;
  const Matrix<T> got{rows, width, round_up(width, kernels<T>().vector)};
  kernels<T>().load_rows(got.row(0), got.stride, bits.data(), dtype, width, rows, width, nullptr);
  int64_t wrong = 0;
  for (int64_t i = 0; i < rows * width; i++) {
    const double exact = value_of(static_cast<uint16_t>(i)), value = got.row(i / width)[i % width];
    wrong += std::isnan(exact) ? !std::isnan(value) : value != exact;
  }
  check(what, double(wrong), 0);
}

template <class T, class S>
void check_load(DType dtype, int64_t width) {
  const int64_t rows = 3, vector = kernels<T>().vector;
  std::vector<S> source(rows * (width + 2));
  for (size_t i = 0; i < source.size(); i++) source[i] = S(i) / 8 - 3;
  const T factor[] = {1, 2, T(0.25)};
  Matrix<T> got{rows, width, round_up(width, vector)};
  std::fill_n(got.row(0), rows * got.stride, T(NAN));
  kernels<T>().load_rows(got.row(0), got.stride, source.data(), dtype, width + 2, rows, width, factor);
  int64_t wrong = 0;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t d = 0; d < got.stride; d++)
      wrong += got.row(r)[d] != (d < width ? T(source[r * (width + 2) + d]) * factor[r] : T(0));
  check("load_rows", double(wrong), 0);
}

template <class T>
void check_width(int64_t width) {
  const Kernels<T>& k = kernels<T>();
  check_load<T, float>(DType::float32, width);
  check_load<T, double>(DType::float64, width);
  Random random(static_cast<uint32_t>(width));
  const Matrix<T> x = random.matrix<T>(1, width), y = random.matrix<T>(1, width);
  const T *a = x.row(0), *b = y.row(0);
  Exact dot, sum;
  for (int64_t d = 0; d < width; d++) dot.add(double(a[d]) * b[d]), sum.add(a[d]);
  const double unit = kEpsilon<T> * (2 + width / k.vector);
  check("dot", std::abs(k.dot(a, b, width) - dot.value), unit * dot.size);
  check("sum", std::abs(k.sum(a, width) - sum.value), unit * sum.size);
  Matrix<T> out{1, width + 1, width + 1};
  std::copy_n(b, width, out.row(0));
  k.add_scaled(out.row(0), a, T(0.75), width);
  Worst worst;
  for (int64_t d = 0; d < width; d++) worst.add(out.row(0)[d], b[d] + 0.75 * a[d], kEpsilon<T> * 2);
  check("add_scaled", worst.error, 1);
  check("add_scaled past the end", std::abs(out.row(0)[width]), 0);
}

template <class T>
void check_type() {
  for (const int64_t width : {1, 3, 8, 37}) {
    check_halves<T>(DType::float16, value_of_half, "conversion of float16", width);
    check_halves<T>(DType::bfloat16, value_of_bfloat16, "conversion of bfloat16", width);
  }
  for (int64_t width = 1; width <= 2 * kernels<T>().panel + 1; width++) check_width<T>(width);
  for (const int64_t width : {1000, 4099}) check_width<T>(width);
}

}  // namespace

void check_rows() {
  check_type<float>();
  check_type<double>();
}

}  // namespace fastcl::cpu
