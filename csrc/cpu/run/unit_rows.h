// Rows on their way in (normalized, padded) and their gradients on the way out.
#pragma once

#include "cpu/run/problem.h"

namespace fastcl::cpu {

constexpr int64_t kRowGrain = 128;  // rows per task of a row-wise loop

// A tensor's rows as they came: any floating type, any row stride.
struct Input {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;
  int64_t count = 0;
  int64_t width = 0;

  const void* row(int64_t i) const { return row_of(data, dtype, i * stride); }
};

// Unit rows of one or two inputs, stacked and padded to whole vectors.
template <class T>
struct UnitRows {
  Buffer<T> rows;
  Buffer<T> inverse;  // inverse norms; null without normalization
  int64_t count = 0, width = 0, stride = 0;

  T* row(int64_t i) const { return rows.get() + i * stride; }
  Rows<T> as_rows() const { return {rows.get(), DType::float32, stride, count, width, true}; }
};

template <class T>
UnitRows<T> unit_rows(std::initializer_list<Input> inputs, bool normalize);

// The same without the rows: only the inverse norms, if normalized.
template <class T>
UnitRows<T> inverse_norms(const Input& input, bool normalize);

// Rows used as they are, without a copy: converted tile by tile unless they are T already. `factor` (null: 1)
// multiplies each as it is read.
template <class T>
Rows<T> key_rows(const Input& input, const T* factor = nullptr);

// How products of float32 rows may be made, as torch.set_float32_matmul_precision says; the Python side's
// numbers. The products of bfloat16 rows are exact as they are.
enum class Precision : int { highest, high, medium };

// Parts of the operands of bfloat16 products; 0: they are to be made in the compute type.
int bfloat16_parts(std::initializer_list<DType> dtypes, Precision precision);
// Whether products of the rows of these factors (null: 1), inverse norms, stay within float32's range before
// they are applied: the units take what is smaller for zero.
bool products_fit(const float* inverse, int64_t count);

// A side for bfloat16 products: inputs stacked, each row times its factor (null: 1).
struct BFloat16Side {
  Buffer<uint16_t> memory;
  Buffer<float> factor;
  BFloat16Rows rows;
};
BFloat16Side bfloat16_side(std::initializer_list<Input> inputs, const float* factor, int parts);
// The same from the inputs of `unit`: exact for bfloat16 inputs, whose norms become factors. Where `unit` has
// no rows, the inputs are used as they are.
BFloat16Side bfloat16_side(std::initializer_list<Input> inputs, const UnitRows<float>& unit, int parts);

// Both sides for bfloat16 products, where such are to be made; else parts is 0.
struct BFloat16Sides {
  BFloat16Side query, key;
  BFloat16Problem problem;
};
// A null `key`: the query; a null `key_unit`: its rows are used as they are.
BFloat16Sides bfloat16_sides(std::initializer_list<Input> query, const UnitRows<float>& unit,
                             const Input* key, const UnitRows<float>* key_unit, Precision precision);

// Gradient of input row i, into `out`, from `sum`, that of its unit row before the scale; returns
// <unit row, sum>. `out` may be `sum`.
template <class T>
T input_gradient(const UnitRows<T>& unit, int64_t i, T scale, const T* sum, T* out);
// The same of `count` rows of `keys` from `begin` on, `sums_stride` apart in `sums`; `inverse`: the keys'
// inverse norms, null without normalization.
template <class T>
void write_key_gradients(const Rows<T>& keys, const T* inverse, T scale, int64_t begin, int64_t count,
                         const T* sums, int64_t sums_stride, T* out, Scratch& scratch);

// sum += the parts of row i
template <class T>
void add_parts(const Partials<T>& partials, int64_t i, T* sum) {
  for (int64_t p = 0; p < partials.parts; p++)
    kernels<T>().add_scaled(sum, partials.row(p, i), T(1), partials.width);
}

// Calls take(begin, count, sums, scratch), from many threads, with the sums of ranges of rows, `width` apart.
template <class T, class Take>
void for_each_sum(const Partials<T>& partials, const Take& take) {
  for_each_range(partials.rows, kRowGrain, [&](int64_t begin, int64_t end, Scratch& scratch) {
    const int64_t count = end - begin, width = partials.width;
    T* const sums = scratch.take<T>(kSumSlot, kRowGrain * width);
    std::fill_n(sums, count * width, T(0));
    for (int64_t i = 0; i < count; i++) add_parts(partials, begin + i, sums + i * width);
    take(begin, count, sums, scratch);
  });
}

// Gradients of all rows: sum(i, row) adds up what input_gradient() takes, out(i) says where the gradient goes
// (null: nowhere); `radial` (null: nowhere) receives what it returns. `factor` (null: 1): a scale per row,
// too.
template <class T, class Sum, class Out>
void write_gradients(const UnitRows<T>& unit, T scale, const Sum& sum, const Out& out, T* radial,
                     const T* factor = nullptr) {
  for_each_range(unit.count, kRowGrain, [&](int64_t begin, int64_t end, Scratch& scratch) {
    T* row = scratch.take<T>(kQuerySlot, unit.stride);
    for (int64_t i = begin; i < end; i++) {
      std::fill_n(row, unit.stride, T(0));
      sum(i, row);
      T* const to = out(i);
      const T dot = input_gradient(unit, i, factor ? scale * factor[i] : scale, row, to ? to : row);
      if (radial) radial[i] = dot;
    }
  });
}
template <class T>
auto rows_of(T* out, int64_t width) {
  return [=](int64_t i) { return out ? out + i * width : nullptr; };
}

// log(1 + e^x) and its derivative; 0 and 0 at -inf, NaN at NaN.
template <class T>
struct SoftPlus {
  T value, slope;
};
template <class T>
SoftPlus<T> softplus(T x);

}  // namespace fastcl::cpu
