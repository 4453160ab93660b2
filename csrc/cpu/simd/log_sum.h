// Running log-sum-exps over the lanes and rows of a tile, by sums that keep what rounding leaves out.
#pragma once

#include "cpu/simd/kernels.h"
#include "cpu/simd/vec.h"

namespace fastcl::cpu {
namespace {

// One exponential per pair serves two maxima while they are at most this far apart (log2 units).
template <class T>
constexpr T kSharedRange = 24;

template <class T>
int64_t vectors_of(const Tile<T>& tile) {
  return ceil_div(tile.lanes, kLanes<T>);
}
template <class T>
Vec<T> empty_vector() {
  return splat(excluded_logit<T>);
}

constexpr int64_t kSumRows = 16;  // rows of a tile that are summed at once

// sum = sum * factor + x
template <class T>
void add(Sum<T> running, Vec<T> x, Vec<T> factor) {
  const Vec<T> before = load(running.sum) * factor, after = before + x, added = after - before;
  store(running.rest, load(running.rest) * factor + ((before - (after - added)) + (x - added)));
  store(running.sum, after);
}
template <class T>
void add(Sum<T> running, T x, T factor) {
  const T before = *running.sum * factor, after = before + x, added = after - before;
  *running.rest = *running.rest * factor + ((before - (after - added)) + (x - added));
  *running.sum = after;
}

template <class T>
void lane_max(Tile<T> tile, T* max) {
  for (int64_t v = 0; v < vectors_of(tile); v++) {
    Vec<T> best = load(max + v * kLanes<T>);
    for (int64_t r = 0; r < tile.rows; r++) best = maximum(best, load(tile.row(r) + v * kLanes<T>));
    store(max + v * kLanes<T>, best);
  }
}

// Sum over the rows of value(row), in blocks.
template <class T, class Value>
Vec<T> sum_of_rows(int64_t rows, const Value& value) {
  Vec<T> sum = {};
  for (int64_t first = 0; first < rows; first += kSumRows) {
    const int64_t end = rows - first < kSumRows ? rows : first + kSumRows;
    Vec<T> block = {};
    for (int64_t r = first; r < end; r++) block += value(r);
    sum += block;
  }
  return sum;
}

template <class T>
void lane_log_sum(Tile<T> tile, LogSum<T> lane) {
  for (int64_t v = 0; v < vectors_of(tile); v++) {
    const int64_t offset = v * kLanes<T>;
    const Vec<T> before = load(lane.max + offset);
    Vec<T> max = before;
    for (int64_t r = 0; r < tile.rows; r++) max = maximum(max, load(tile.row(r) + offset));
    const Vec<T> sum =
        sum_of_rows<T>(tile.rows, [&](int64_t r) { return exp2(load(tile.row(r) + offset) - max); });
    add(lane.sum + offset, sum, exp2(before - max));
    store(lane.max + offset, max);
  }
}

template <class T>
void row_log_sum(Tile<T> tile, LogSum<T> row) {
  for (int64_t r = 0; r < tile.rows; r++) {
    Vec<T> best = empty_vector<T>();
    for (int64_t v = 0; v < vectors_of(tile); v++) best = maximum(best, load(tile.row(r) + v * kLanes<T>));
    const Vec<T> max = splat(maximum(row.max[r], horizontal_max<T>(best)));
    Vec<T> sum = {};
    for (int64_t v = 0; v < vectors_of(tile); v++) sum += exp2(load(tile.row(r) + v * kLanes<T>) - max);
    add(row.sum + r, horizontal_sum<T>(sum), exp2(splat(row.max[r]) - max)[0]);
    row.max[r] = max[0];
  }
}

template <class T>
void add_biases(Tile<T> to, Tile<T> tile, const T* lane, const T* row) {
  for (int64_t r = 0; r < tile.rows; r++) {
    const Vec<T> of_row = splat(row ? row[r] : T(0));
    for (int64_t i = 0; i < vectors_of(tile) * kLanes<T>; i += kLanes<T>)
      store(to.row(r) + i, load(tile.row(r) + i) + of_row + (lane ? load(lane + i) : Vec<T>{}));
  }
}

template <class T>
void rescale(Tile<T> to, Tile<T> tile, T factor) {
  for (int64_t r = 0; r < tile.rows; r++) {
    for (int64_t i = 0; i < vectors_of(tile) * kLanes<T>; i += kLanes<T>) {
      const Vec<T> s = load(tile.row(r) + i);
      store(to.row(r) + i, s <= excluded_logit<T> / 2 ? empty_vector<T>() : s * factor);
    }
  }
}

// Adds a tile's sums, taken relative to `reference`, to running sums of `count` (whole vectors).
template <class T>
void merge_log_sum(LogSum<T> running, const T* tile_max, const T* tile_sum, T reference, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> before = load(running.max + i), max = maximum(before, load(tile_max + i));
    // an empty lane's sum is 0: the bound only keeps its factor finite
    const Vec<T> shift = minimum(splat(reference) - max, splat(2 * kSharedRange<T>));
    add(running.sum + i, load(tile_sum + i) * exp2(shift), exp2(before - max));
    store(running.max + i, max);
  }
}

template <class T>
void both_log_sum(Tile<T> tile, LogSum<T> lane, LogSum<T> row) {
  alignas(64) T lane_best[kMaxTile], row_best[kMaxTile], lane_sum[kMaxTile], row_sum[kMaxTile];
  alignas(64) T block_sum[kMaxTile];
  const int64_t vectors = vectors_of(tile);
  for (int64_t v = 0; v < vectors; v++) {
    store(lane_best + v * kLanes<T>, empty_vector<T>());
    store(lane_sum + v * kLanes<T>, Vec<T>{});
  }
  T highest = excluded_logit<T>, lowest = -excluded_logit<T>;
  auto widen = [&](T best) {
    highest = maximum(highest, best);
    lowest = is_empty(best) ? lowest : minimum(lowest, best);
  };
  for (int64_t r = 0; r < tile.rows; r++) {
    Vec<T> best = empty_vector<T>();
    for (int64_t v = 0; v < vectors; v++) {
      const Vec<T> s = load(tile.row(r) + v * kLanes<T>);
      best = maximum(best, s);
      store(lane_best + v * kLanes<T>, maximum(load(lane_best + v * kLanes<T>), s));
    }
    row_best[r] = horizontal_max<T>(best);
    widen(row_best[r]);
  }
  for (int64_t i = 0; i < tile.lanes; i++) widen(lane_best[i]);
  if (highest - lowest > kSharedRange<T>) {
    lane_log_sum(tile, lane);
    row_log_sum(tile, row);
    return;
  }
  const Vec<T> reference = splat(highest);
  for (int64_t first = 0; first < tile.rows; first += kSumRows) {
    const int64_t end = tile.rows - first < kSumRows ? tile.rows : first + kSumRows;
    for (int64_t v = 0; v < vectors; v++) store(block_sum + v * kLanes<T>, Vec<T>{});
    for (int64_t r = first; r < end; r++) {
      Vec<T> sum = {};
      for (int64_t v = 0; v < vectors; v++) {
        const Vec<T> e = exp2(load(tile.row(r) + v * kLanes<T>) - reference);
        sum += e;
        store(block_sum + v * kLanes<T>, load(block_sum + v * kLanes<T>) + e);
      }
      row_sum[r] = horizontal_sum<T>(sum);
    }
    for (int64_t i = 0; i < vectors * kLanes<T>; i += kLanes<T>)
      store(lane_sum + i, load(lane_sum + i) + load(block_sum + i));
  }
  merge_log_sum(lane, lane_best, lane_sum, highest, tile.lanes);
  merge_log_sum(row, row_best, row_sum, highest, tile.rows);
}

template <class T>
void exponentiate(Tile<T> tile, const T* max, T* sum) {
  for (int64_t v = 0; v < vectors_of(tile); v++) {
    const int64_t offset = v * kLanes<T>;
    const Vec<T> lane_best = load(max + offset);
    const Vec<T> added = sum_of_rows<T>(tile.rows, [&](int64_t r) {
      const Vec<T> e = exp2(load(tile.row(r) + offset) - lane_best);
      store(tile.row(r) + offset, e);
      return e;
    });
    store(sum + offset, load(sum + offset) + added);
  }
}

}  // namespace
}  // namespace fastcl::cpu
