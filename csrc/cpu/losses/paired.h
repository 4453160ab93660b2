// The loss with one positive and negatives of each query's own, value and gradients in one call.
#pragma once

#include "cpu/losses/one_positive.h"

namespace fastcl::cpu {

// The negatives are (N * M, D): those of a query follow each other.
template <class T>
void paired(const OnePositive& args, const OnePositiveResult<T>& result);

}  // namespace fastcl::cpu
