// Run-time choice of the instruction set.
#pragma once

#include "cpu/simd/bfloat16.h"

namespace fastcl::cpu {

// In this order in ISA_LEVELS of the Python side.
#if defined(__aarch64__)
enum class Isa : int { generic, neon };
#else
enum class Isa : int { generic, avx2, avx512, avx512_bf16, amx };
#endif

Isa best_isa();
Isa current_isa();
void force_isa(Isa isa);

template <class T>
const Kernels<T>& kernels();
const BFloat16Kernels* bfloat16_kernels();  // null without such units
// Whether three products of bfloat16 take less time than one of float32.
bool split_products_are_faster();

}  // namespace fastcl::cpu
