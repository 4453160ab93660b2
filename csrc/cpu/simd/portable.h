// What vec.h says by any processor's instructions.
#pragma once

#include "cpu/simd/vec.h"

namespace fastcl::cpu {
namespace {

// A bit per lane: not (a <= b), so that NaN counts as above.
template <class V>
inline uint32_t not_at_most(V a, V b) {
  const auto at_most = a <= b;
  uint32_t bits = 0;
  for (uint32_t i = 0; i < sizeof(V) / sizeof(a[0]); i++) bits |= uint32_t(at_most[i] == 0) << i;
  return bits;
}

}  // namespace
}  // namespace fastcl::cpu
