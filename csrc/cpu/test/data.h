// Random inputs, and sums in double precision to compare with.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cpu/run/memory.h"
#include "cpu/simd/isa.h"

namespace fastcl::cpu {

template <class T>
constexpr double kEpsilon = std::numeric_limits<T>::epsilon();

// Rows padded with zeros to `stride`, and readable to whole vectors.
template <class T>
struct Matrix {
  int64_t rows, width, stride;
  Buffer<T> data = allocate_filled<T>(rows * stride + kMaxTile, T(0));

  T* row(int64_t i) const { return data.get() + i * stride; }
};

class Random {
 public:
  explicit Random(uint32_t seed) : bits_(seed) {}

  // Of 1/64 steps, so that differences of two are exact.
  double between(double low, double high) {
    return std::round((low + (high - low) * (bits_() / 4294967296.0)) * 64) / 64;
  }
  template <class T>
  Matrix<T> matrix(int64_t rows, int64_t width, double size = 1) {
    Matrix<T> x{rows, width, round_up(width, kernels<T>().vector)};
    for (int64_t i = 0; i < rows; i++)
      for (int64_t d = 0; d < width; d++) x.row(i)[d] = static_cast<T>(between(-size, size));
    return x;
  }

 private:
  std::mt19937 bits_;
};

// A sum of products, and how large its terms are together.
struct Exact {
  double value = 0, size = 0;

  void add(double term) { value += term, size += std::abs(term); }
};

// The largest error of many, each in units of its own.
struct Worst {
  double error = 0;

  void add(double got, double exact, double unit) {
    const double now = std::abs(got - exact) / unit;
    if (!(now <= error)) error = now;
  }
};

}  // namespace fastcl::cpu
