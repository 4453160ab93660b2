// Rows divided by their L2 norm, as F.normalize does.
#pragma once

#include <type_traits>

#include "cuda/tile.cuh"

namespace fastcl::cuda {
inline namespace FASTCL_BODY {

constexpr float kLargestInverse = 1e12f;  // norms below its inverse are not differentiated

template <class T>
FASTCL_TILE float norm(const Block& block, const T* x, int width) {
  return sqrtf(block.warp_sum(width, [&](int d) {
    const float value = x[d];
    return value * value;
  }));
}

// 0 for a zero row, which so stays zero.
FASTCL_TILE float inverse_norm(float norm) {
  return norm == 0 ? 0 : norm < 1 / kLargestInverse ? kLargestInverse : 1 / norm;
}

// An inverse norm has two factors. The first is applied when a row is staged: for half types a power of two,
// which is exact and brings it near unit length, so that nothing overflows or is lost; for float32 all of it.
// The second, 1 to 2, to float32 results.
template <class T>
FASTCL_TILE float staged_factor(float inverse) {
  return std::is_same_v<T, float> ? inverse : float_of_bits(float_bits(inverse) & 0xff800000u);
}
template <class T>
FASTCL_TILE float later_factor(float inverse) {
  return std::is_same_v<T, float> ? 1 : float_of_bits((float_bits(inverse) & 0x007fffffu) | 0x3f800000u);
}

}  // namespace FASTCL_BODY
}  // namespace fastcl::cuda
