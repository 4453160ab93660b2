// Sinkhorn and Knopp's iteration on the potentials of a matrix of logits.
#pragma once

#include "cpu/losses/stats.h"

namespace fastcl::cpu {

// of_keys (K): the keys' potentials after so many rounds, from zero: of_keys_j = -LSE_i(l_ij + of_rows_i),
// then of_rows_i = -LSE_j(l_ij + of_keys_j).
template <class T>
void sinkhorn(const Problem<T>& problem, int64_t steps, T* of_keys);

}  // namespace fastcl::cpu
