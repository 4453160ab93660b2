// The one-launch losses: how a problem is divided over a grid, and what its kernel is given.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "cuda/grid.h"
#include "layout.h"

namespace fastcl::cuda {

constexpr int kTile = 64;  // rows and columns that a block multiplies at a time
constexpr int kPackBytes = 16;
constexpr int kStageBytes = 256;   // of a row, staged at a time
constexpr int kStagePadding = 16;  // so that a column of fragments meets every bank once
constexpr int kBankBytes = 4;

constexpr int parts(int count, int size) { return std::max(1, (count + size - 1) / size); }

// A similarity matrix over the rows of all inputs, numbered through: queries, positives or keys, negatives.
struct Matrix {
  int second_input, third_input;  // their first rows
  int rows;                       // of all inputs
  int queries, first_key, keys;   // queries from row 0 on, keys from row `first_key` on
  bool symmetric;                 // keys are the queries: only squares on and above the diagonal
  bool two_sided;                 // keys are compared with all queries too

  // More rows than fit anywhere do not overflow.
  static constexpr int bounded(int64_t count) { return static_cast<int>(std::min<int64_t>(count, 1 << 24)); }

  static constexpr Matrix one_positive(Layout layout, int64_t samples, int64_t negatives) {
    const int n = bounded(samples), m = bounded(negatives);
    const bool views = layout == Layout::views, given = layout == Layout::negatives;
    return {n,
            2 * n,
            2 * n + m,
            views ? 2 * n : n,
            views   ? 0
            : given ? 2 * n
                    : n,
            views   ? 2 * n
            : given ? m
                    : n,
            views,
            views || layout == Layout::pairs};
  }
  // Keys none: the queries themselves.
  static constexpr Matrix all_pairs(int64_t queries, std::optional<int64_t> keys) {
    const int n = bounded(queries), m = bounded(keys.value_or(0));
    return {n, n + m, n + m, n, keys ? n : 0, keys ? m : n, !keys, !keys};
  }
};

// What a square holds in shared memory.
struct Storage {
  int cell_bytes;  // of a pair
  int line_bytes;  // of a row or column
};

// Each block keeps one square of the similarity matrix.
struct Plan {
  Matrix matrix;
  Storage storage;
  int width;
  int edge;  // of a square
  int query_blocks, key_blocks;
  int blocks;  // one per square, and more where there are rows for them

  constexpr int squares() const {
    return matrix.symmetric ? query_blocks * (query_blocks + 1) / 2 : query_blocks * key_blocks;
  }
  // How many squares a row can meet: partial results have one slot for each.
  constexpr int slots() const { return std::max(query_blocks, key_blocks); }

  // An odd number of banks: neither rows nor columns conflict.
  constexpr int pitch() const { return edge + kBankBytes / storage.cell_bytes; }
  constexpr int64_t square_bytes() const { return int64_t(edge) * pitch() * storage.cell_bytes; }
  static constexpr int64_t kStagedTile = kTile * (kStageBytes + kStagePadding);
  constexpr int64_t shared_bytes() const {
    return 2 * kStagedTile + square_bytes() + int64_t(2) * edge * storage.line_bytes;
  }
};

// None where the squares do not fit: the device limits the number of rows. Cells are float32 where there is
// room, else of the inputs' type.
inline std::optional<Plan> make_plan(const Matrix& matrix, int64_t width, int element_bytes, int line_bytes,
                                     const Device& device) {
  for (int cell_bytes : {int(sizeof(float)), element_bytes})
    // whole tiles where they fit: a part of one takes as long
    for (int step : {kTile, kFragment}) {
      Plan plan{matrix, {cell_bytes, line_bytes}, Matrix::bounded(width)};
      for (plan.edge = step; plan.shared_bytes() <= device.shared_bytes; plan.edge += step) {
        plan.query_blocks = parts(matrix.queries, plan.edge);
        plan.key_blocks = parts(matrix.keys, plan.edge);
        if (std::max(plan.query_blocks, plan.key_blocks) > device.blocks || plan.squares() > device.blocks)
          continue;
        plan.blocks = std::min(device.blocks, std::max(plan.squares(), parts(matrix.rows, kWarps)));
        return plan;
      }
    }
  return {};
}

// use(zero) with a zero of the type of the plan's cells, T being the inputs'.
template <class T, class Use>
void with_cell_type(const Plan& plan, const Use& use) {
  if (plan.storage.cell_bytes == sizeof(T)) return use(T());
  if constexpr (sizeof(T) < sizeof(float)) use(0.0f);
}

// Where the phases of a launch leave what the next one reads: offsets into one buffer of floats.
struct Work {
  int64_t inverse;      // (rows) what a row is multiplied by
  int64_t length;       // (rows) its length then
  int64_t cosine;       // (second_input) of a query and its positive
  int64_t statistics;   // (statistics, slots, rows) of one line of one square
  int64_t pull;         // (rows) minus the gradient of the positive's logit
  int64_t block_loss;   // (blocks)
  int64_t along_scale;  // (blocks, warps) parts of the scale's gradient
  int64_t sums;         // (slots, rows, width) weighted sums of unit rows
  int64_t total;

  Work(const Plan& plan, int statistics_count, bool row_gradients) {
    int64_t used = 0;
    auto take = [&](int64_t count) { return std::exchange(used, used + count); };
    const int rows = plan.matrix.rows;
    const int64_t cells = int64_t(plan.slots()) * rows;
    inverse = take(rows);
    length = take(rows);
    cosine = take(plan.matrix.second_input);
    statistics = take(statistics_count * cells);
    pull = take(rows);
    block_loss = take(plan.blocks);
    along_scale = take(int64_t(plan.blocks) * kWarps);
    sums = take(row_gradients ? cells * plan.width : 0);
    total = used;
  }
};

// What one lane loads at a time.
template <class T>
struct alignas(kPackBytes) Pack {
  static constexpr int kCount = kPackBytes / sizeof(T);
  T at[kCount];
};

template <class T>
struct Input {
  const T* data;
  int64_t stride;
  bool normalize;
};

// What every loss's kernel is given.
template <class T>
struct OneLaunch {
  Input<T> inputs[3];
  bool packed;  // all rows can be read in whole packs
  const float* scale;
  bool mean;
  // contiguous; gradients are for an incoming gradient of 1, null where not wanted
  float *loss, *gradients[3], *scale_gradient;
  Plan plan;
  Work work;
  float* memory;  // work.total floats

  constexpr bool any_gradient() const {
    return gradients[0] || gradients[1] || gradients[2] || scale_gradient;
  }
};

// The losses. Each says how many numbers describe a line of one square, and how many its weights are made of.

struct OnePositiveLoss {
  static constexpr int kStatistics = 2, kTerms = 3;
  static constexpr bool kLabels = false, kPulls = true;
  Layout layout;
  const int64_t *query_ids, *negative_ids;  // null where nothing is excluded by id
};

struct SupConLoss {
  static constexpr int kStatistics = 6, kTerms = 6;
  static constexpr bool kLabels = true, kPulls = false;
  const int64_t *query_labels, *key_labels;
  bool log_of_mean;  // of the positives' probabilities; else the mean of their logs
};

constexpr int kLineNumbers = 3;  // of every loss's lines, before its terms

template <class Loss>
constexpr int line_bytes() {
  return int(sizeof(float)) * (kLineNumbers + Loss::kTerms) + (Loss::kLabels ? int(sizeof(int64_t)) : 0);
}

}  // namespace fastcl::cuda
