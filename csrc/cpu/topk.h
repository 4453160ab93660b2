// The k most similar keys of each query, streaming.
#pragma once

#include "cpu/problem.h"

namespace fastcl {

// values and indices are (N, k) row-major; ties go to the lower index, missing entries are -inf and -1.
template <class T>
void topk(const Problem<T>& problem, int64_t k, T* values, int64_t* indices);

}  // namespace fastcl
