// What vec.h says by x86's own instructions.
#pragma once

#include <immintrin.h>

#include "cpu/simd/vec.h"

namespace fastcl::cpu {
namespace {

// A bit per lane: not (a <= b), so that NaN counts as above.
inline uint32_t not_at_most(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ));
#else
  return _mm_movemask_ps(_mm_cmpnle_ps((__m128)a, (__m128)b));
#endif
}
inline uint32_t not_at_most(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_NLE_UQ));
#else
  return _mm_movemask_pd(_mm_cmpnle_pd((__m128d)a, (__m128d)b));
#endif
}

}  // namespace
}  // namespace fastcl::cpu
