// One register-blocked kernel behind every product: c = scale a b + c, with any strides of a.
#pragma once

#include "cpu/simd/vec.h"

namespace fastcl::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kMicroRows = 12;  // 24 accumulators of 32 registers
#elif defined(FASTCL_NEON)
constexpr int kMicroRows = 10;  // 20 of 32: broadcasts are loaded into registers first
#else
constexpr int kMicroRows = 6;  // 12 of 16
#endif
constexpr int kMicroVectors = 2;
template <class T>
constexpr int64_t kPanel = kMicroVectors * kLanes<T>;

// A sum is formed in blocks of so many terms: its error grows with a block and the number of blocks, not
// with the whole depth.
constexpr int64_t kDepth = 128;

// What a block of the sum becomes: scale * sum, added to what c holds or to a value per row (null: zero).
// The scale multiplies the sum, so that a b and b a are rounded alike.
template <class T>
struct Finish {
  bool accumulate;
  T scale;
  const T* bias;
};

template <class T>
struct Operand {
  const T* data;
  int64_t row, column;  // strides
};

template <class T, int ROWS, int VECTORS>
void micro_kernel(int64_t depth, Operand<T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride,
                  Finish<T> finish) {
  Vec<T> acc[ROWS][VECTORS] = {};
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) __builtin_prefetch(c + r * c_stride + v * kLanes<T>, 1);
  }
  for (int64_t k = 0; k < depth; k++) {
    Vec<T> bv[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) bv[v] = load(b + k * b_stride + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      T x = a.data[r * a.row + k * a.column];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) acc[r][v] += x * bv[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
      T* to = c + r * c_stride + v * kLanes<T>;
      const Vec<T> start = finish.accumulate ? load(to) : finish.bias ? splat(finish.bias[r]) : Vec<T>{};
      store(to, acc[r][v] * finish.scale + start);
    }
  }
}

template <class T>
using MicroKernel = void (*)(int64_t, Operand<T>, const T*, int64_t, T*, int64_t, Finish<T>);

// The kernel for a block of `rows` (1 to kMicroRows) by `vectors`.
template <class T, int ROWS = kMicroRows>
MicroKernel<T> micro_kernel_for(int64_t rows, int64_t vectors) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return vectors == 1 ? micro_kernel<T, ROWS, 1> : micro_kernel<T, ROWS, 2>;
    return micro_kernel_for<T, ROWS - 1>(rows, vectors);
  }
  return nullptr;
}

// c (rows, columns) from a (rows, depth) and b (depth, columns); columns is a multiple of the vector.
// b is stored in panels of kPanel columns, panel_stride apart, its rows b_stride apart.
template <class T>
void gemm(int64_t rows, int64_t columns, int64_t depth, Operand<T> a, const T* b, int64_t b_stride,
          int64_t panel_stride, T* c, int64_t c_stride, Finish<T> finish) {
  for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
    const int64_t terms = depth - k < kDepth ? depth - k : kDepth;
    for (int64_t j = 0; j < columns; j += kPanel<T>) {
      const int64_t vectors = (columns - j < kPanel<T> ? columns - j : kPanel<T>) / kLanes<T>;
      const T* panel = b + j / kPanel<T> * panel_stride + k * b_stride;
      for (int64_t i = 0; i < rows; i += kMicroRows) {
        const int64_t block = rows - i < kMicroRows ? rows - i : kMicroRows;
        const Operand<T> left{a.data + i * a.row + k * a.column, a.row, a.column};
        micro_kernel_for<T>(block, vectors)(
            terms, left, panel, b_stride, c + i * c_stride + j, c_stride,
            {finish.accumulate || k > 0, finish.scale, finish.bias ? finish.bias + i : nullptr});
      }
    }
  }
}

}  // namespace
}  // namespace fastcl::cpu
