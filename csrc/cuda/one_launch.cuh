// A whole loss with one positive per row, gradients included, in one launch of a grid that stays.
//
// Every block computes one square of the similarity matrix and keeps it in shared memory:
//   1  norms, and the cosines of the positives
//   2  the square; (max, sum) of its rows and columns
//   3  those of all squares merged: losses; the square becomes the gradient of its logits, and its products
//      with the unit rows of either side go to memory
//   4  row by row: products added up in a fixed order, the positive's pull, the way back through the norm
// with a grid barrier between them. For views (keys are queries) the squares are those on and above the
// diagonal: each serves its rows and, as columns, the rows of its transpose.
#pragma once

#include "cuda/one_launch.h"
#include "cuda/unit_rows.cuh"

namespace fastcl {
inline namespace FASTCL_BODY {

constexpr float kExcluded = -1e38f;  // a logit that takes no part
constexpr float kEmptyMax = -1e37f;  // the largest logit of a line where none does
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

enum Side { kQuery, kKey };

template <class T>
class OneLaunchKernel {
 public:
  FASTCL_TILE OneLaunchKernel(const Block& block, const OneLaunch<T>& args)
      : block_(block), args_(args), plan_(args.plan) {
    find_square();
    char* memory = block.shared();
    staged_[kQuery] = reinterpret_cast<T*>(memory);
    staged_[kKey] = reinterpret_cast<T*>(memory + Plan::kStagedTile);
    square_ = reinterpret_cast<float*>(memory + 2 * Plan::kStagedTile);
    inverse_ = square_ + int64_t(plan_.edge) * plan_.pitch();
    max_ = inverse_ + 2 * plan_.edge;
    factor_ = max_ + 2 * plan_.edge;
    positive_ = factor_ + 2 * plan_.edge;
  }

  FASTCL_TILE void run() {
    normalize();
    block_.grid_barrier();
    load_inverses(kQuery);
    load_inverses(kKey);
    block_.barrier();
    for (int query = 0; query < count_[kQuery]; query += kTile)
      for (int key = 0; key < count_[kKey]; key += kTile) multiply_rows(query, key);
    block_.barrier();
    summarize(kQuery);
    if (column_lines()) summarize(kKey);
    block_.grid_barrier();
    merge(kQuery);
    merge(kKey);
    block_.barrier();
    add_losses();
    if (args_.any_gradient()) {
      const float unit = form_weights();
      block_.barrier();
      if (sums_wanted(kQuery)) multiply_weights(kQuery, unit);
      if (sums_wanted(kKey)) multiply_weights(kKey, unit);
    }
    block_.grid_barrier();
    if (block_.index() == 0 && block_.warp() == 0) finish_scalars();
    finish_rows();
  }

 private:
  static constexpr int kChunk = kStageBytes / sizeof(T), kPitch = kChunk + kStagePadding / sizeof(T);
  static constexpr int kWarpRows = kFragment, kWarpsDown = kTile / kWarpRows,
                       kWarpsAcross = kWarps / kWarpsDown;

  // ---- who is who ----

  // Blocks beyond the squares help with the rows only.
  FASTCL_TILE void find_square() {
    on_diagonal_ = false;
    for (Side side : {kQuery, kKey}) position_[side] = -1, first_[side] = count_[side] = 0;
    if (block_.index() >= plan_.squares()) return;
    int query_block = 0, key_block = block_.index();
    while (key_block >= plan_.key_blocks) {
      query_block++;
      key_block -= plan_.key_blocks - (plan_.symmetric ? query_block : 0);
    }
    position_[kQuery] = query_block;
    position_[kKey] = key_block;
    first_[kQuery] = query_block * plan_.edge;
    first_[kKey] = plan_.first_key + key_block * plan_.edge;
    count_[kQuery] = rows_within(first_[kQuery], plan_.queries);
    count_[kKey] = rows_within(first_[kKey], plan_.first_key + plan_.keys);
    on_diagonal_ = plan_.symmetric && query_block == key_block;
  }
  FASTCL_TILE int rows_within(int first, int end) const {
    return end <= first ? 0 : end - first < plan_.edge ? end - first : plan_.edge;
  }

  FASTCL_TILE bool two_sided() const {
    return args_.layout == Layout::views || args_.layout == Layout::pairs;
  }
  // Whether the square's columns have statistics of their own, and are not the rows again.
  FASTCL_TILE bool column_lines() const { return two_sided() && !on_diagonal_; }
  // Each line's loss is added by one block only.
  FASTCL_TILE bool owns_lines(Side side) const {
    if (side == kKey) return args_.layout == Layout::pairs && position_[kQuery] == 0;
    return plan_.symmetric ? on_diagonal_ : position_[kKey] == 0;
  }
  FASTCL_TILE bool sums_wanted(Side side) const {
    if (plan_.symmetric)
      return (side == kQuery || !on_diagonal_) && (args_.gradients[0] || args_.gradients[1]);
    if (side == kQuery) return args_.gradients[0];
    return args_.gradients[args_.layout == Layout::negatives ? 2 : 1];
  }

  FASTCL_TILE int input_of(int row) const {
    return row < plan_.samples ? 0 : row < 2 * plan_.samples ? 1 : 2;
  }
  FASTCL_TILE const T* input_row(int row) const {
    const int input = input_of(row);
    return args_.inputs[input].data + int64_t(row - input * plan_.samples) * args_.inputs[input].stride;
  }
  FASTCL_TILE int sample_of(int row) const { return row < plan_.samples ? row : row - plan_.samples; }
  FASTCL_TILE bool excluded(int query, int key) const {
    if (args_.layout != Layout::negatives) return sample_of(query) == sample_of(key);
    return args_.query_ids && args_.query_ids[query] == args_.negative_ids[key - plan_.first_key];
  }

  FASTCL_TILE float* work(int64_t offset) const { return args_.memory + offset; }
  // The cell of the square's line among the partial results.
  FASTCL_TILE int64_t cell(Side side, int line) const {
    return int64_t(position_[1 - side]) * plan_.rows + first_[side] + line;
  }
  // The square as lines of one side and positions on them.
  FASTCL_TILE float& at(Side side, int line, int position) const {
    return side == kQuery ? square_[line * plan_.pitch() + position]
                          : square_[position * plan_.pitch() + line];
  }
  FASTCL_TILE float& inverse(Side side, int line) const { return inverse_[side * plan_.edge + line]; }
  FASTCL_TILE float& max(Side side, int line) const { return max_[side * plan_.edge + line]; }
  FASTCL_TILE float& factor(Side side, int line) const { return factor_[side * plan_.edge + line]; }
  FASTCL_TILE float& positive(Side side, int line) const { return positive_[side * plan_.edge + line]; }

  // ---- phase 1 ----

  FASTCL_TILE float inverse_of(int row) const {
    return args_.inputs[input_of(row)].normalize ? inverse_norm(block_, input_row(row), plan_.width) : 1;
  }

  FASTCL_TILE void normalize() const {
    for (int row = block_.grid_warp(); row < plan_.rows; row += block_.grid_warps()) {
      const float inverse = inverse_of(row);
      if (block_.leader()) work(args_.work.inverse)[row] = inverse;
      if (row >= plan_.samples) continue;
      const T *x = input_row(row), *positive = input_row(row + plan_.samples);
      const float product = block_.warp_sum(
          plan_.width, [&](int d) { return static_cast<float>(x[d]) * static_cast<float>(positive[d]); });
      const float cosine = product * inverse * inverse_of(row + plan_.samples);
      if (block_.leader()) work(args_.work.cosine)[row] = cosine;
    }
  }

  // ---- phase 2 ----

  FASTCL_TILE void load_inverses(Side side) const {
    const float* inverses = work(args_.work.inverse) + first_[side];
    block_.template each<1>(count_[side], [&](int line) { inverse(side, line) = inverses[line]; });
  }

  // A tile's rows, near unit length; zero beyond the matrix.
  FASTCL_TILE void stage(Side side, int line, int from) const {
    constexpr int kCount = Pack<T>::kCount, kPacks = kChunk / kCount;
    if (!args_.packed) return stage_by_element(side, line, from);
    block_.each(kTile * kPacks, [&](int i) {
      const int row = i / kPacks, d = i % kPacks * kCount;
      Pack<T> pack{};
      if (line + row < count_[side] && from + d < plan_.width) {
        pack = *reinterpret_cast<const Pack<T>*>(input_row(first_[side] + line + row) + from + d);
        const float factor = staged_factor<T>(inverse(side, line + row));
        FASTCL_UNROLL
        for (T& x : pack.at) x = static_cast<T>(static_cast<float>(x) * factor);
      }
      *reinterpret_cast<Pack<T>*>(staged_[side] + row * kPitch + d) = pack;
    });
  }
  FASTCL_TILE void stage_by_element(Side side, int line, int from) const {
    block_.template each<1>(kTile * kChunk, [&](int i) {
      const int row = i / kChunk, d = i % kChunk;
      float value = 0;
      if (line + row < count_[side] && from + d < plan_.width)
        value = static_cast<float>(input_row(first_[side] + line + row)[from + d]) *
                staged_factor<T>(inverse(side, line + row));
      staged_[side][row * kPitch + d] = static_cast<T>(value);
    });
  }

  // Of logits in log2 units. At zero the scale's gradient is still to be had from them.
  FASTCL_TILE float logit_scale2() const {
    const float scale = *args_.scale;
    return scale == 0 ? 1e-30f : scale * kLog2E;
  }

  // The logits of a tile, in log2 units, from its first query and key on.
  FASTCL_TILE void multiply_rows(int query, int key) const {
    constexpr int kColumns = kTile / kWarpsAcross;
    const int warp_row = block_.warp() / kWarpsAcross * kWarpRows,
              warp_column = block_.warp() % kWarpsAcross * kColumns;
    Accumulator<kColumns> products;
    for (int from = 0; from < plan_.width; from += kChunk) {
      stage(kQuery, query, from);
      stage(kKey, key, from);
      block_.barrier();
      for (int depth = 0; depth < kChunk && from + depth < plan_.width; depth += kFragment) {
        FragmentA<T> x;
        x.load(staged_[kQuery] + warp_row * kPitch + depth, kPitch);
        FASTCL_UNROLL
        for (int column = 0; column < kColumns; column += kFragment) {
          FragmentB<T> y;
          y.load_transposed(staged_[kKey] + (warp_column + column) * kPitch + depth, kPitch);
          products.add_product(column, x, y);
        }
      }
      block_.barrier();
    }
    const float scale2 = logit_scale2();
    products.each([&](int row, int column, float product) {
      const int i = query + warp_row + row, j = key + warp_column + column;
      const bool inside = i < count_[kQuery] && j < count_[kKey];
      const bool counts = inside && !excluded(first_[kQuery] + i, first_[kKey] + j);
      at(kQuery, i, j) =
          counts ? scale2 * later_factor<T>(inverse(kQuery, i)) * later_factor<T>(inverse(kKey, j)) * product
                 : kExcluded;
    });
  }

  FASTCL_TILE void summarize(Side side) const {
    for (int line = block_.warp(); line < count_[side]; line += kWarps) {
      const int others = count_[1 - side];
      const float max = block_.warp_max(others, kEmptyMax, [&](int i) { return at(side, line, i); });
      const float sum = block_.warp_sum(others, [&](int i) { return exp2f(at(side, line, i) - max); });
      if (block_.leader()) {
        work(args_.work.log_sum_max)[cell(side, line)] = max;
        work(args_.work.log_sum)[cell(side, line)] = sum;
      }
    }
  }

  // ---- phase 3 ----

  // Loss and slope of every line of the square; of a line without statistics, a weight of zero.
  FASTCL_TILE void merge(Side side) const {
    block_.template each<1>(plan_.edge, [&](int line) {
      max(side, line) = -kExcluded;
      factor(side, line) = positive(side, line) = 0;
      if (line < count_[side] && (side == kQuery || two_sided())) merge_line(side, line);
    });
  }

  FASTCL_TILE void merge_line(Side side, int line) const {
    const int row = first_[side] + line;
    const int slots = side == kQuery ? plan_.key_blocks : plan_.query_blocks;
    const float *maxima = work(args_.work.log_sum_max) + row, *sums = work(args_.work.log_sum) + row;
    float top = kEmptyMax, sum = 0;
    for (int slot = 0; slot < slots; slot++) top = fmaxf(top, maxima[slot * plan_.rows]);
    for (int slot = 0; slot < slots; slot++)
      sum += sums[slot * plan_.rows] * exp2f(maxima[slot * plan_.rows] - top);
    const float weight = args_.layout == Layout::pairs ? 0.5f : 1.0f;
    float loss = 0, slope = 0;
    if (sum != 0) {
      const float cosine = work(args_.work.cosine)[sample_of(row)];
      const float excess = (top + log2f(sum)) * kLn2 - *args_.scale * cosine;
      loss = weight * (fmaxf(excess, 0) + log1pf(expf(-fabsf(excess))));
      slope = weight / (1 + expf(-excess));
      max(side, line) = top;
      factor(side, line) = slope / sum;
      positive(side, line) = logit_scale2() * cosine;
    }
    if (!owns_lines(side)) return;
    work(args_.work.pull)[row] = slope;
    loss_of(side, line) = loss;
  }

  // Where the tiles were staged there is room for the losses.
  FASTCL_TILE float& loss_of(Side side, int line) const {
    return reinterpret_cast<float*>(staged_[kQuery])[side * plan_.edge + line];
  }
  FASTCL_TILE void add_losses() const {
    if (block_.warp() != 0) return;
    const float sum = sum_of_losses(kQuery) + sum_of_losses(kKey);
    if (block_.leader()) work(args_.work.block_loss)[block_.index()] = sum;
  }

  FASTCL_TILE float sum_of_losses(Side side) const {
    if (!owns_lines(side)) return 0;
    return block_.warp_sum(count_[side], [&](int line) { return loss_of(side, line); });
  }

  // Logits become their gradients, in units (returned) that bring the largest to 1 or 2: in half types they
  // would underflow, and many equal ones should be exact.
  FASTCL_TILE float form_weights() const {
    const float unit = block_.warp_max(2 * plan_.edge, 1e-30f, [&](int i) { return factor_[i]; });
    const float inverse_unit = 1 / unit;
    const int rows = (count_[kQuery] + kTile - 1) / kTile * kTile,
              columns = (count_[kKey] + kTile - 1) / kTile * kTile;
    float along_scale = 0;
    for (int i = block_.warp(); i < rows; i += kWarps)
      along_scale += block_.warp_sum(columns, [&](int j) {
        float& logit = at(kQuery, i, j);
        const float by_row = exp2f(logit - max(kQuery, i)) * factor(kQuery, i),
                    by_column = exp2f(logit - max(kKey, j)) * factor(kKey, j);
        const float along_row = by_row * (logit - positive(kQuery, i)),
                    along_column = by_column * (logit - positive(kKey, j));
        logit = (by_row + by_column) * inverse_unit;
        return on_diagonal_ ? along_row : along_row + along_column;
      });
    if (block_.leader()) work(args_.work.along_scale)[block_.grid_warp()] = along_scale;
    return unit;
  }

  // The lines of one side times the other side's unit rows.
  FASTCL_TILE void multiply_weights(Side side, float unit) const {
    constexpr int kColumns = kChunk / kWarpsAcross;
    const int warp_row = block_.warp() / kWarpsAcross * kWarpRows,
              warp_column = block_.warp() % kWarpsAcross * kColumns;
    const Side other = side == kQuery ? kKey : kQuery;
    for (int tile = 0; tile < count_[side]; tile += kTile)
      for (int from = 0; from < plan_.width; from += kChunk) {
        Accumulator<kColumns> sums;
        for (int others = 0; others < count_[other]; others += kTile) {
          stage(other, others, from);
          block_.barrier();
          for (int depth = 0; depth < kTile; depth += kFragment) {
            FragmentA<T> weights;
            weights.fill([&](int row, int i) {
              const int position = others + depth + i;
              return at(side, tile + warp_row + row, position) * later_factor<T>(inverse(other, position));
            });
            FASTCL_UNROLL
            for (int column = 0; column < kColumns; column += kFragment) {
              if (from + warp_column + column >= plan_.width) break;
              FragmentB<T> rows;
              rows.load(staged_[other] + depth * kPitch + warp_column + column, kPitch);
              sums.add_product(column, weights, rows);
            }
          }
          block_.barrier();
        }
        sums.each([&](int row, int column, float sum) {
          const int line = tile + warp_row + row;
          const int d = from + warp_column + column;
          if (line < count_[side] && d < plan_.width)
            work(args_.work.sums)[cell(side, line) * plan_.width + d] = sum * unit;
        });
      }
  }

  // ---- phase 4 ----

  FASTCL_TILE float incoming() const { return args_.mean ? 1.0f / plan_.queries : 1.0f; }

  FASTCL_TILE void finish_scalars() const {
    const float loss = block_.warp_sum(plan_.blocks, [&](int i) { return work(args_.work.block_loss)[i]; });
    if (block_.leader()) *args_.loss = args_.mean ? loss / plan_.queries : loss;
    if (!args_.scale_gradient) return;
    const float sum =
        block_.warp_sum(block_.grid_warps(), [&](int i) { return work(args_.work.along_scale)[i]; });
    if (block_.leader()) *args_.scale_gradient = sum / logit_scale2() * incoming();
  }

  FASTCL_TILE void finish_rows() const {
    for (int row = block_.grid_warp(); row < plan_.rows; row += block_.grid_warps())
      if (const int input = input_of(row); args_.gradients[input]) finish_row(row, input);
  }

  FASTCL_TILE void finish_row(int row, int input) const {
    const int width = plan_.width;
    const int64_t step = int64_t(plan_.rows) * width;
    const bool query = row < plan_.queries;
    const bool key = row >= plan_.first_key && row < plan_.first_key + plan_.keys;
    const int slots = query ? plan_.key_blocks : key ? plan_.query_blocks : 0;
    const float* inverses = work(args_.work.inverse);
    const float inverse = inverses[row];
    const T *x = input_row(row), *positive = x;
    float pull = 0;  // towards the unit row of the positive
    if (input < 2) {
      const int sample = sample_of(row), partner = input == 0 ? row + plan_.samples : sample;
      const float* pulls = work(args_.work.pull);
      positive = input_row(partner);
      pull = (pulls[sample] + (two_sided() ? pulls[sample + plan_.samples] : 0)) * inverses[partner];
    }
    float* sums = work(args_.work.sums) + int64_t(row) * width;
    const float radial = block_.warp_sum(width, [&](int d) {
      float sum = -pull * static_cast<float>(positive[d]);
      for (int slot = 0; slot < slots; slot++) sum += sums[slot * step + d];
      sums[d] = sum;
      return sum * static_cast<float>(x[d]) * inverse;
    });
    const bool projected = args_.inputs[input].normalize && inverse < kLargestInverse;
    const float along = projected ? radial * inverse : 0, scale = *args_.scale * inverse * incoming();
    float* to = args_.gradients[input] + int64_t(row - input * plan_.samples) * width;
    block_.warp_each(width, [&](int d) { to[d] = (sums[d] - static_cast<float>(x[d]) * along) * scale; });
  }

  const Block& block_;
  const OneLaunch<T>& args_;
  const Plan& plan_;
  int position_[2];  // of the square among squares, by side
  int first_[2];
  int count_[2];
  bool on_diagonal_;
  T* staged_[2];                                 // (kTile, kPitch) each
  float* square_;                                // (edge, pitch)
  float *inverse_, *max_, *factor_, *positive_;  // (2, edge) each
};

}  // namespace FASTCL_BODY
}  // namespace fastcl
