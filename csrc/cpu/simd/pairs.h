// The pair rule over the pairs of a tile, told by their ids or by a byte each.
#pragma once

#include "cpu/simd/log_sum.h"

namespace fastcl::cpu {
namespace {

// Calls body(row) for the rows whose id lies in the range of the lanes' ids: most tiles have none.
template <class T, class Body>
void for_rows_in_range(Tile<T> tile, Ids ids, Body body) {
  int64_t low = ids.lane[0], high = ids.lane[0];
  for (int64_t i = 1; i < tile.lanes; i++) {
    low = ids.lane[i] < low ? ids.lane[i] : low;
    high = ids.lane[i] > high ? ids.lane[i] : high;
  }
  for (int64_t r = 0; r < tile.rows; r++)
    if (ids.row[r] >= low && ids.row[r] <= high) body(r);
}

template <class T>
void exclude(Tile<T> tile, Ids ids) {
  for_rows_in_range(tile, ids, [&](int64_t r) {
    T* s = tile.row(r);
    const int64_t id = ids.row[r];
    for (int64_t i = 0; i < tile.lanes; i++) s[i] = ids.lane[i] == id ? excluded_logit<T> : s[i];
  });
}

template <class T>
void exclude_different(Tile<T> tile, Ids ids) {
  for (int64_t r = 0; r < tile.rows; r++) {
    T* s = tile.row(r);
    const int64_t id = ids.row[r];
    for (int64_t i = 0; i < tile.lanes; i++) s[i] = ids.lane[i] == id ? s[i] : excluded_logit<T>;
  }
}

// for_rows(body) calls body(row) for the rows that may have positives; is_positive(row, lane) tells them.
template <class T, class ForRows, class IsPositive>
void split_rows(Tile<T> tile, Tile<T> positive, PositiveSums<T> lane, PositiveSums<T> row, ForRows for_rows,
                IsPositive is_positive) {
  const int64_t padded = vectors_of(tile) * kLanes<T>;
  for (int64_t r = 0; r < tile.rows; r++)
    for (int64_t i = 0; i < padded; i += kLanes<T>) store(positive.row(r) + i, empty_vector<T>());
  alignas(64) T lane_sum[kMaxTile];
  int64_t summed = 0;
  auto flush = [&] {
    for (int64_t i = 0; summed && i < padded; i += kLanes<T>)
      add(lane.sum + i, load(lane_sum + i), splat(T(1)));
    for (int64_t i = 0; i < padded; i += kLanes<T>) store(lane_sum + i, Vec<T>{});
    summed = 0;
  };
  flush();
  for_rows([&](int64_t r) {
    T *s = tile.row(r), *p = positive.row(r);
    for (int64_t i = 0; i < tile.lanes; i++) {
      const bool moved = is_positive(r, i) && !is_empty(s[i]);
      p[i] = moved ? s[i] : excluded_logit<T>;
      s[i] = moved ? excluded_logit<T> : s[i];
    }
    Vec<T> sum = {}, count = {};
    for (int64_t i = 0; i < padded; i += kLanes<T>) {
      const Vec<T> value = load(p + i), zero = {};
      const auto counts = value > excluded_logit<T> / 2 || value != value;
      const Vec<T> counted = counts ? value : zero, one = counts ? splat(T(1)) : zero;
      store(lane_sum + i, load(lane_sum + i) + counted);
      store(lane.count + i, load(lane.count + i) + one);
      sum += counted;
      count += one;
    }
    add(row.sum + r, horizontal_sum<T>(sum), T(1));
    row.count[r] += horizontal_sum<T>(count);
    if (++summed == kSumRows) flush();
  });
  flush();
}

template <class T>
void split(Tile<T> tile, Tile<T> positive, Ids ids, PositiveSums<T> lane, PositiveSums<T> row) {
  split_rows(
      tile, positive, lane, row, [&](const auto& body) { for_rows_in_range(tile, ids, body); },
      [&](int64_t r, int64_t i) { return ids.lane[i] == ids.row[r]; });
}

template <class T>
void split_members(Tile<T> tile, Tile<T> positive, const uint8_t* members, PositiveSums<T> lane,
                   PositiveSums<T> row) {
  split_rows(
      tile, positive, lane, row,
      [&](const auto& body) {
        for (int64_t r = 0; r < tile.rows; r++) body(r);
      },
      [&](int64_t r, int64_t i) { return members[r * tile.stride + i] != 0; });
}

}  // namespace
}  // namespace fastcl::cpu
