// Vectors of the instruction set this file is compiled for, by the compiler's vector extension.
#pragma once

#include <cstdint>

namespace fastcl {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
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

// 2^x within an ulp for x <= 120 or so; 0 below the smallest normal number; NaN for NaN.
inline Vec<float> exp2(Vec<float> x) {
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
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
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  const double round = 0x1.8p52;
  Vec<double> shifted = x + round;
  Vec<double> f = x - (shifted - round);
  // minimax polynomial, relative error 3e-18
  Vec<double> p = 4.455817908336064493e-10 * f + 7.0741942972885210056e-9;
  p = p * f + 1.0178057087733941105e-7;
  p = p * f + 1.3215432535912376166e-6;
  p = p * f + 1.5252733841556772589e-5;
  p = p * f + 1.5403530463724354209e-4;
  p = p * f + 1.3333558146406470697e-3;
  p = p * f + 9.6181290875072566681e-3;
  p = p * f + 5.5504108664821627039e-2;
  p = p * f + 2.4022650695910159567e-1;
  p = p * f + 6.9314718055994530925e-1;
  p = p * f + 1.0;
  Int exponent = (reinterpret_cast<Int>(shifted) << 52) + 0x3ff0000000000000;
  return x < -1022.0 ? Vec<double>{} : p * reinterpret_cast<Vec<double>>(exponent);
}

}  // namespace
}  // namespace fastcl
