// Two softmaxes over the rows of a tile: their running state, their cross-entropy, their difference.
#pragma once

#include "cpu/simd/log_sum.h"

namespace fastcl::cpu {
namespace {

template <class T>
void soften(Tile<T> tile, LogSum<T> lane, T* decay, T* out) {
  for (int64_t i = 0; i < vectors_of(tile) * kLanes<T>; i += kLanes<T>) {
    const Vec<T> before = load(lane.max + i);
    Vec<T> max = before;
    for (int64_t r = 0; r < tile.rows; r++) max = maximum(max, load(tile.row(r) + i));
    const Vec<T> sum = sum_of_rows<T>(tile.rows, [&](int64_t r) {
      const Vec<T> e = exp2(load(tile.row(r) + i) - max);
      store(out + r * tile.stride + i, e);
      return e;
    });
    const Vec<T> factor = exp2(before - max);
    add(lane.sum + i, sum, factor);
    store(lane.max + i, max);
    store(decay + i, factor);
  }
}

template <class T>
void add_distances(Tile<T> logit, const T* weight, const T* max, const T* shift, const T* decay, Sum<T> sum) {
  for (int64_t i = 0; i < vectors_of(logit) * kLanes<T>; i += kLanes<T>) {
    const Vec<T> top = load(max + i);
    const Vec<T> added = sum_of_rows<T>(logit.rows, [&](int64_t r) {
      return load(weight + r * logit.stride + i) * (top - load(logit.row(r) + i));
    });
    add(sum + i, added + load(shift + i), load(decay + i));
  }
}

template <class T>
void add_softmax(Tile<T> tile, Weight<T> lane, T* out, bool first) {
  for (int64_t i = 0; i < vectors_of(tile) * kLanes<T>; i += kLanes<T>) {
    const Vec<T> max = load(lane.max + i), factor = load(lane.factor + i);
    for (int64_t r = 0; r < tile.rows; r++) {
      T* const to = out + r * tile.stride + i;
      const Vec<T> p = exp2(load(tile.row(r) + i) - max) * factor;
      store(to, first ? p : load(to) + p);
    }
  }
}

template <class T>
void softmax_less_target(Tile<T> tile, Weight<T> lane, const T* target, const T* gradient, T* out) {
  for (int64_t i = 0; i < vectors_of(tile) * kLanes<T>; i += kLanes<T>) {
    const Vec<T> max = load(lane.max + i), factor = load(lane.factor + i), grad = load(gradient + i);
    for (int64_t r = 0; r < tile.rows; r++) {
      const int64_t at = r * tile.stride + i;
      store(out + at, (exp2(load(tile.s + at) - max) * factor - load(target + at)) * grad);
    }
  }
}

}  // namespace
}  // namespace fastcl::cpu
