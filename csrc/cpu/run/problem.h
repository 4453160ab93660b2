// A statistics call on the CPU: both sides' rows, the pair rule, and the results.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/run/plan.h"
#include "cpu/simd/isa.h"

namespace fastcl::cpu {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

inline int64_t bytes_of(DType dtype) {
  constexpr int64_t kSize[] = {8, 4, 2, 2};
  return kSize[static_cast<int>(dtype)];
}
inline const void* row_of(const void* data, DType dtype, int64_t offset) {
  return static_cast<const char*>(data) + offset * bytes_of(dtype);
}

// Rows of one side, each to be read times its factor (null: 1). Those that are of T and of whole vectors
// (`direct`) are used where they lie, unless they have factors; others are converted tile by tile.
template <class T>
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;
  int64_t count = 0;
  int64_t width = 0;
  bool direct = false;
  const T* factor = nullptr;

  const T* row(int64_t i) const { return static_cast<const T*>(data) + i * stride; }
  int64_t row_bytes() const { return width * bytes_of(dtype); }
  const void* source(int64_t i) const { return row_of(data, dtype, i * stride); }

  Rows without_factors() const { return {data, dtype, stride, count, width, direct}; }

  // `rows` rows from `first` as T; out_stride receives their stride.
  const T* tile(int64_t first, int64_t rows, int slot, Scratch& scratch, int64_t* out_stride) const {
    if (direct && !factor) {
      *out_stride = stride;
      return row(first);
    }
    const Kernels<T>& k = kernels<T>();
    *out_stride = round_up(width, k.vector);
    T* out = scratch.take<T>(slot, kMaxBlock * *out_stride);
    k.load_rows(out, *out_stride, source(first), dtype, stride, rows, width,
                factor ? factor + first : nullptr);
    return out;
  }
};

// Both sides for products of bfloat16; parts is 0 where products are made in T.
struct BFloat16Problem {
  BFloat16Rows query, key;
  int parts = 0;
};

struct PairRule;

template <class T>
struct Problem {
  Rows<T> query, key;
  BFloat16Problem bfloat16;
  T scale2 = 0;                    // logits in log2 units per unit of similarity
  const T* bias2 = nullptr;        // (M), log2 units, or null
  Ids exclude, positive;           // row: key ids (M), lane: query ids (N); null without the rule
  const PairRule* rule = nullptr;  // what more there is of the rule
  bool symmetric = false;          // key is query: tiles above the diagonal serve both sides
  T second_scale = 0;              // not 0: the positives are the negatives again, logits times this
};

// Scratch slots of a task; from kPackedSlot on those of its products.
enum Slot {
  kTileSlot,
  kPositiveSlot,
  kSumSlot,
  kQuerySlot,
  kPackedSlot,
  kLaneSlot,
  kKeySlot,
  kRoundedSlot,
  kLogitSlot,
  kRuleSlot,
  kSlots
};

// Results in parts, which are summed, or merged, when all are done.
template <class T>
struct Partials {
  Buffer<T> memory;
  int64_t parts = 0, rows = 0, width = 0;
  T* given = nullptr;  // the memory, where it is another's

  T* part(int64_t p) const { return (given ? given : memory.get()) + p * rows * width; }
  T* row(int64_t p, int64_t i) const { return part(p) + i * width; }
  explicit operator bool() const { return given || memory; }
};
template <class T>
Partials<T> make_partials(int64_t parts, int64_t rows, int64_t width) {
  return {allocate<T>(parts * rows * width), parts, rows, width};
}

// State of a side: arrays of `stride`.
template <class T>
struct State {
  Buffer<T> memory;
  int64_t stride = 0;

  enum Field {
    kNegMax,
    kNegSum,
    kNegRest,
    kPosMax,
    kPosSum,
    kPosRest,
    kPositiveSums,
    kFields = kPositiveSums + PositiveSums<T>::kArrays
  };
  T* field(int f) const { return memory.get() + f * stride; }
  LogSum<T> negative(int64_t i) const {
    return {field(kNegMax) + i, {field(kNegSum) + i, field(kNegRest) + i}};
  }
  LogSum<T> positive(int64_t i) const {
    return {field(kPosMax) + i, {field(kPosSum) + i, field(kPosRest) + i}};
  }
  PositiveSums<T> positive_sums(int64_t i) const {
    return PositiveSums<T>::over(field(kPositiveSums) + i, stride);
  }
};

template <class T>
State<T> make_state(int64_t count);
template <class T>
void merge_log_sum(LogSum<T> into, LogSum<T> other);
// Adds `other` to `into`, entry by entry.
template <class T>
void merge_state(const State<T>& into, const State<T>& other, int64_t begin, int64_t end);

// Natural log-sum-exp of a state entry, less a logit in log2 units; -inf when empty.
template <class T>
T log_sum_exp(T max, T sum, T less = 0) {
  if (is_empty(max) && !std::isnan(sum)) return -INFINITY;
  return static_cast<T>((max - less + std::log2(sum)) * static_cast<T>(kLn2));
}

// Factor of a weight: gradient over sum, 0 for an empty set, NaN where the sum is.
template <class T>
T weight_factor(T gradient, T max, T sum) {
  return is_empty(max) && !std::isnan(sum) ? T(0) : gradient / sum;
}

}  // namespace fastcl::cpu
