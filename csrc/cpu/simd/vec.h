// Vectors of the instruction set this file is compiled for, by the compiler's vector extension.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastcl::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__aarch64__)
using Float16 = __fp16;  // in C++ the compiler knows _Float16 there from GCC 13 on
#else
using Float16 = _Float16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias, aligned(alignof(T))));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}
// Keeps a where b is NaN: the maximum of a row stays a number, its sum carries the NaN.
template <class V>
inline V maximum(V a, V b) {
  return b > a ? b : a;
}
template <class V>
inline V minimum(V a, V b) {
  return b < a ? b : a;
}
template <class T>
inline T horizontal_sum(Vec<T> v) {
  T total = v[0];
  for (int64_t i = 1; i < kLanes<T>; i++) total += v[i];
  return total;
}
template <class T>
inline T horizontal_max(Vec<T> v) {
  T best = v[0];
  for (int64_t i = 1; i < kLanes<T>; i++) best = v[i] > best ? v[i] : best;
  return best;
}

// As wide as T.
template <class T>
using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Transposes a square, by swapping ever larger blocks across its diagonal.
template <class T>
inline void transpose(Vec<T> (&square)[kLanes<T>]) {
  typedef Index<T> Indices __attribute__((vector_size(kVectorBytes)));
  constexpr int kSide = kLanes<T>;
#pragma GCC unroll 4
  for (int half = 1; half < kSide; half *= 2) {
    Indices low = {}, high = {};
    for (int e = 0; e < kSide; e++) {
      low[e] = e & half ? kSide + e - half : e;
      high[e] = e & half ? kSide + e : e + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; i++) {
      if (i & half) continue;
      const Vec<T> a = square[i], b = square[i + half];
      square[i] = __builtin_shuffle(a, b, low);
      square[i + half] = __builtin_shuffle(a, b, high);
    }
  }
}

// 2^x within 1.2 ulp, 1 where multiply-adds are fused, for x <= 120 or so; 0 below the smallest
// normal number; NaN for NaN.
inline Vec<float> exp2(Vec<float> x) {
  typedef uint32_t Int __attribute__((vector_size(kVectorBytes)));  // which may overflow
  const float round = 0x1.8p23f;
  Vec<float> shifted = x + round;
  Vec<float> f = x - (shifted - round);  // [-1/2, 1/2]
  // minimax polynomial, relative error 2e-9
  Vec<float> p = 1.5461444698569e-4f * f + 1.3400428177616e-3f;
  p = p * f + 9.6180566785246e-3f;
  p = p * f + 5.5503272266703e-2f;
  p = p * f + 2.40226509222888e-1f;
  p = p * f + 6.93147206702833e-1f;
  p = p * f + 1.0f;
  Int exponent = (reinterpret_cast<Int>(shifted) << 23) + 0x3f800000;
  return x < -126.0f ? Vec<float>{} : p * reinterpret_cast<Vec<float>>(exponent);
}

inline Vec<double> exp2(Vec<double> x) {
  typedef uint64_t Int __attribute__((vector_size(kVectorBytes)));  // which may overflow
  const double round = 0x1.8p52;
  Vec<double> shifted = x + round;
  Vec<double> f = x - (shifted - round);
  // minimax polynomial, relative error below 1e-17
  Vec<double> p = 2.5733568308756891235e-11 * f + 4.4566753410492058782e-10;
  p = p * f + 7.0548943863483480445e-9;
  p = p * f + 1.017805119296064896e-7;
  p = p * f + 1.3215486815999976975e-6;
  p = p * f + 0.000015252733856293466416;
  p = p * f + 0.00015403530393362755291;
  p = p * f + 0.0013333558146390352775;
  p = p * f + 0.0096181291076284830543;
  p = p * f + 0.055504108664821698992;
  p = p * f + 0.24022650695910071228;
  p = p * f + 0.69314718055994530835;
  p = p * f + 1.0;
  Int exponent = (reinterpret_cast<Int>(shifted) << 52) + 0x3ff0000000000000;
  return x < -1022.0 ? Vec<double>{} : p * reinterpret_cast<Vec<double>>(exponent);
}

}  // namespace
}  // namespace fastcl::cpu

#if defined(__x86_64__)
#include "cpu/simd/x86.h"
#elif defined(FASTCL_NEON)
#include "cpu/simd/neon.h"
#else
#include "cpu/simd/portable.h"
#endif
