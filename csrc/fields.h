// The order of fields in what Python and C++ exchange: that of fastcl/similarity/fields.py and problem.py.
#pragma once

#include <cstdint>

namespace fastcl::shared {

// Of packed statistics (kCount, rows).
struct StatisticsFields {
  enum { kLseNeg, kLsePos, kPosSum, kPosCount, kMaxNeg, kCount };
};

// Of a packed state (kCount, rows): maxima in log2 units and sums of exp2(logit - maximum).
struct StateFields {
  enum { kNegMax, kNegTotal, kPosMax, kPosTotal, kCount };
};

// Which inputs of a statistics call need a gradient.
struct Needs {
  enum : int64_t { kQuery = 1, kKey = 2, kScale = 4, kKeyBias = 8, kKeyScale = 16 };
};

}  // namespace fastcl::shared
namespace fastcl {
using namespace shared;
}
