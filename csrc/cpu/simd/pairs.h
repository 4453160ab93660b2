// The pair rule over the pairs of a tile, told by their ids or by a byte each.
#pragma once

#include "cpu/simd/log_sum.h"

namespace fastcl::cpu {
namespace {

// The lanes' ids by their hashes: of the rows whose id no lane has, few pass.
class IdFilter {
 public:
  IdFilter(const int64_t* ids, int64_t count) {
    for (int64_t i = 0; i < count; i++) bits_[hash(ids[i]) / 64] |= uint64_t{1} << hash(ids[i]) % 64;
  }
  bool may_contain(int64_t id) const { return bits_[hash(id) / 64] >> hash(id) % 64 & 1; }

 private:
  static constexpr int kHashBits = 12;
  static uint64_t hash(int64_t id) {
    return static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15 >> (64 - kHashBits);
  }
  uint64_t bits_[(1 << kHashBits) / 64] = {};
};

// Of the lanes' ids: most tiles have no row whose id lies in it.
struct IdRange {
  int64_t low, high;

  bool contains(int64_t id) const { return id >= low && id <= high; }
  // Whether the differences from the lowest do.
  template <class Code>
  bool fits() const {
    const uint64_t width = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
    return width >> (8 * sizeof(Code) - 1) == 0;
  }
};
IdRange range_of(const int64_t* ids, int64_t count) {
  IdRange range{ids[0], ids[0]};
  for (int64_t i = 1; i < count; i++) {
    range.low = ids[i] < range.low ? ids[i] : range.low;
    range.high = ids[i] > range.high ? ids[i] : range.high;
  }
  return range;
}

template <class T>
void exclude(Tile<T> tile, Ids ids) {
  const IdFilter filter(ids.lane, tile.lanes);
  for (int64_t r = 0; r < tile.rows; r++) {
    T* s = tile.row(r);
    const int64_t id = ids.row[r];
    if (!filter.may_contain(id)) continue;
    for (int64_t i = 0; i < tile.lanes; i++) s[i] = ids.lane[i] == id ? excluded_logit<T> : s[i];
  }
}

template <class T>
void exclude_different(Tile<T> tile, Ids ids) {
  for (int64_t r = 0; r < tile.rows; r++) {
    T* s = tile.row(r);
    const int64_t id = ids.row[r];
    for (int64_t i = 0; i < tile.lanes; i++) s[i] = ids.lane[i] == id ? s[i] : excluded_logit<T>;
  }
}

// may_have(row) tells the rows that may have positives; is_positive(row, lane) their pairs.
template <class T, class MayHave, class IsPositive>
void split_rows(Tile<T> tile, Split<T> to, PositiveSums<T> lane, PositiveSums<T> row, MayHave may_have,
                IsPositive is_positive) {
  const int64_t padded = vectors_of(tile) * kLanes<T>;
  alignas(64) T lane_sum[kMaxTile];
  int64_t summed = 0;
  auto flush = [&] {
    for (int64_t i = 0; summed && i < padded; i += kLanes<T>)
      add(lane.sum + i, load(lane_sum + i), splat(T(1)));
    for (int64_t i = 0; i < padded; i += kLanes<T>) store(lane_sum + i, Vec<T>{});
    summed = 0;
  };
  flush();
  for (int64_t r = 0; r < tile.rows; r++) {
    const T* const s = tile.row(r);
    T *const negative = to.negative.row(r), *const positive = to.positive.row(r);
    if (!may_have(r)) {
      for (int64_t i = 0; i < padded; i += kLanes<T>) {
        store(negative + i, load(s + i));
        store(positive + i, empty_vector<T>());
      }
      continue;
    }
#pragma GCC ivdep  // `negative` may be s itself
    for (int64_t i = 0; i < padded; i++) {
      const T logit = s[i];
      const bool moved = is_positive(r, i);
      positive[i] = moved ? logit : excluded_logit<T>;
      negative[i] = moved ? excluded_logit<T> : logit;
    }
    if (!lane.count) continue;
    Vec<T> sum = {}, count = {};
    for (int64_t i = 0; i < padded; i += kLanes<T>) {
      const Vec<T> value = load(positive + i), zero = {};
      const auto counts = value != empty_vector<T>();  // -inf is a logit, too
      const Vec<T> counted = counts ? value : zero, one = counts ? splat(T(1)) : zero;
      store(lane_sum + i, load(lane_sum + i) + counted);
      store(lane.count + i, load(lane.count + i) + one);
      sum += counted;
      count += one;
    }
    if (row.count) {
      add(row.sum + r, horizontal_sum<T>(sum), T(1));
      row.count[r] += horizontal_sum<T>(count);
    }
    if (++summed == kSumRows) flush();
  }
  flush();
}

template <class T>
void split(Tile<T> tile, Split<T> to, Ids ids, PositiveSums<T> lane, PositiveSums<T> row) {
  // Ids less the lowest of the lanes', narrow where they fit: as many of them to a vector as of logits.
  using Code = Index<T>;
  alignas(64) Code code[kMaxTile] = {};
  const IdRange range = range_of(ids.lane, tile.lanes);
  auto may_have = [&](int64_t r) { return range.contains(ids.row[r]); };
  if (range.fits<Code>()) {
    for (int64_t i = 0; i < tile.lanes; i++) code[i] = static_cast<Code>(ids.lane[i] - range.low);
    split_rows(tile, to, lane, row, may_have,
               [&](int64_t r, int64_t i) { return code[i] == static_cast<Code>(ids.row[r] - range.low); });
  } else {
    split_rows(tile, to, lane, row, may_have,
               [&](int64_t r, int64_t i) { return i < tile.lanes && ids.lane[i] == ids.row[r]; });
  }
}

template <class T>
void split_members(Tile<T> tile, Split<T> to, const uint8_t* members, PositiveSums<T> lane,
                   PositiveSums<T> row) {
  split_rows(
      tile, to, lane, row, [](int64_t) { return true; },
      [&](int64_t r, int64_t i) { return members[r * tile.stride + i] != 0; });
}

}  // namespace
}  // namespace fastcl::cpu
