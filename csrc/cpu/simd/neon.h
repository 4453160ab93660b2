// What vec.h says by NEON's own instructions.
#pragma once

#include <arm_neon.h>

#include "cpu/simd/vec.h"

namespace fastcl::cpu {
namespace {

template <>
inline float horizontal_sum<float>(Vec<float> v) {
  return vaddvq_f32((float32x4_t)v);
}
template <>
inline double horizontal_sum<double>(Vec<double> v) {
  return vaddvq_f64((float64x2_t)v);
}
// A number wherever a lane holds one.
template <>
inline float horizontal_max<float>(Vec<float> v) {
  return vmaxnmvq_f32((float32x4_t)v);
}
template <>
inline double horizontal_max<double>(Vec<double> v) {
  return vmaxnmvq_f64((float64x2_t)v);
}

// A bit per lane: not (a <= b), so that NaN counts as above.
inline uint32_t not_at_most(Vec<float> a, Vec<float> b) {
  const uint32x4_t bit = {1, 2, 4, 8};
  return vaddvq_u32(vbicq_u32(bit, vcleq_f32((float32x4_t)a, (float32x4_t)b)));
}
inline uint32_t not_at_most(Vec<double> a, Vec<double> b) {
  const uint64x2_t bit = {1, 2};
  return vaddvq_u64(vbicq_u64(bit, vcleq_f64((float64x2_t)a, (float64x2_t)b)));
}

}  // namespace
}  // namespace fastcl::cpu
