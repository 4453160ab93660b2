// Rows on their way in (normalized, padded) and their gradients on the way out.
#pragma once

#include "cpu/problem.h"

namespace fastcl {

constexpr int64_t kRowGrain = 128;  // rows per task of a row-wise loop

// A tensor's rows as they came: any floating type, any row stride.
struct Input {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;
  int64_t count = 0;
  int64_t width = 0;
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

// Rows used as they are, without a copy: converted tile by tile unless they are T already.
template <class T>
Rows<T> key_rows(const Input& input);

// Gradient of row i from `sum`, that of its unit row before the scale, in place; returns <unit row, sum>.
template <class T>
T input_gradient(const UnitRows<T>& unit, int64_t i, T scale, T* sum);

// log(1 + e^x) and its derivative; 0 and 0 at -inf, NaN at NaN.
template <class T>
struct SoftPlus {
  T value, slope;
};
template <class T>
SoftPlus<T> softplus(T x);

}  // namespace fastcl
