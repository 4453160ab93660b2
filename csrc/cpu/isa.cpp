#include "cpu/isa.h"

#include <atomic>

namespace fastcl {

Isa best_isa() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
  return Isa::generic;
}

namespace {
std::atomic<Isa> current{best_isa()};
}

Isa current_isa() { return current; }
void force_isa(Isa isa) { current = isa; }

template <>
const Kernels<float>& kernels<float>() {
  switch (current_isa()) {
    case Isa::avx512:
      return *kernels_float_avx512();
    case Isa::avx2:
      return *kernels_float_avx2();
    default:
      return *kernels_float_generic();
  }
}

template <>
const Kernels<double>& kernels<double>() {
  switch (current_isa()) {
    case Isa::avx512:
      return *kernels_double_avx512();
    case Isa::avx2:
      return *kernels_double_avx2();
    default:
      return *kernels_double_generic();
  }
}

}  // namespace fastcl
