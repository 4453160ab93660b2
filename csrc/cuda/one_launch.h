// The one-launch loss: how a problem is divided over a grid, and what its kernel is given.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "cuda/grid.h"
#include "layout.h"

namespace fastcl {

constexpr int kTile = 64;  // rows and columns that a block multiplies at a time
constexpr int kPackBytes = 16;
constexpr int kStageBytes = 256;   // of a row, staged at a time
constexpr int kStagePadding = 16;  // so that a column of fragments meets every bank once

// Each block keeps one square of the similarity matrix. Rows are numbered through all inputs: queries,
// positives, negatives.
struct Plan {
  int samples, rows, width;
  int queries, first_key, keys;  // the matrix: queries from row 0 on, keys from row `first_key` on
  bool symmetric;                // keys are the queries: only squares on and above the diagonal
  int edge;                      // of a square
  int query_blocks, key_blocks;
  int blocks;  // one per square, and more where there are rows for them

  constexpr int squares() const {
    return symmetric ? query_blocks * (query_blocks + 1) / 2 : query_blocks * key_blocks;
  }
  // How many squares a row can meet: partial results have one slot for each.
  constexpr int slots() const { return std::max(query_blocks, key_blocks); }

  // Shared memory: two staged tiles, the square, and four numbers for each of its lines.
  constexpr int pitch() const { return edge + 1; }  // odd: rows and columns are both free of bank conflicts
  static constexpr int64_t kStagedTile = kTile * (kStageBytes + kStagePadding);
  constexpr int64_t shared_bytes() const {
    return 2 * kStagedTile + (int64_t(edge) * pitch() + 4 * 2 * edge) * int64_t(sizeof(float));
  }
};

constexpr int parts(int count, int size) { return std::max(1, (count + size - 1) / size); }

// None where the squares do not fit: the device limits the number of rows.
inline std::optional<Plan> make_plan(Layout layout, int64_t samples, int64_t negatives, int64_t width,
                                     const Device& device) {
  constexpr int64_t kLargest = 1 << 24;  // beyond any device, and far from overflow
  if (std::max({samples, negatives, width}) > kLargest) return {};
  const int n = static_cast<int>(samples), m = static_cast<int>(negatives);
  const bool views = layout == Layout::views, given = layout == Layout::negatives;
  Plan plan{};
  plan.samples = n;
  plan.rows = 2 * n + m;
  plan.width = static_cast<int>(width);
  plan.queries = views ? 2 * n : n;
  plan.first_key = views ? 0 : given ? 2 * n : n;
  plan.keys = views ? 2 * n : given ? m : n;
  plan.symmetric = views;
  do {
    plan.edge += kTile;
    plan.query_blocks = parts(plan.queries, plan.edge);
    plan.key_blocks = parts(plan.keys, plan.edge);
    if (plan.shared_bytes() > device.shared_bytes) return {};
  } while (plan.query_blocks > device.blocks || plan.key_blocks > device.blocks ||
           plan.squares() > device.blocks);
  plan.blocks = std::min(device.blocks, std::max(plan.squares(), parts(plan.rows, kWarps)));
  return plan;
}

// Where the phases of a launch leave what the next one reads: offsets into one buffer of floats.
struct Work {
  int64_t inverse;      // (rows) 1 / norm
  int64_t cosine;       // (samples) of a query and its positive
  int64_t log_sum_max;  // (slots, rows) of one line of one square, in log2 units
  int64_t log_sum;      // (slots, rows)
  int64_t pull;         // (rows) minus the gradient of the positive's logit
  int64_t block_loss;   // (blocks)
  int64_t along_scale;  // (blocks, warps) parts of the scale's gradient
  int64_t sums;         // (slots, rows, width) weighted sums of unit rows
  int64_t total;

  Work(const Plan& plan, bool gradients) {
    int64_t used = 0;
    auto take = [&](int64_t count) { return std::exchange(used, used + count); };
    const int64_t cells = int64_t(plan.slots()) * plan.rows;
    inverse = take(plan.rows);
    cosine = take(plan.samples);
    log_sum_max = take(cells);
    log_sum = take(cells);
    pull = take(plan.rows);
    block_loss = take(plan.blocks);
    along_scale = take(int64_t(plan.blocks) * kWarps);
    sums = take(gradients ? cells * plan.width : 0);
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

template <class T>
struct OneLaunch {
  Input<T> inputs[3];  // query, positive, negatives
  const int64_t *query_ids, *negative_ids;
  const float* scale;
  Layout layout;
  bool mean;
  bool packed;  // all rows can be read in whole packs
  // contiguous; gradients are for an incoming gradient of 1, null where not wanted
  float *loss, *gradients[3], *scale_gradient;
  Plan plan;
  Work work;
  float* memory;  // work.total floats

  constexpr bool any_gradient() const {
    return gradients[0] || gradients[1] || gradients[2] || scale_gradient;
  }
};

}  // namespace fastcl
