// A whole loss, gradients included, in one launch of a grid that stays.
//
// Every block computes one square of the similarity matrix and keeps it in shared memory:
//   1  norms, and the cosines of the positives
//   2  the square; statistics of its lines, which are its rows and columns
//   3  those of all squares merged: losses; the square becomes the gradient of its logits, and its products
//      with the unit rows of either side go to memory
//   4  row by row: products added up in a fixed order, the positive's pull, the way back through the norm
// with a grid barrier between them. A symmetric matrix has squares on and above the diagonal only: each
// serves its rows and, as columns, the rows of its transpose.
#pragma once

#include "cuda/loss_lines.cuh"

namespace fastcl::cuda {
inline namespace FASTCL_BODY {

// Of rows of T, in cells of C.
template <class T, class C, class Loss>
class OneLaunchKernel {
 public:
  FASTCL_TILE OneLaunchKernel(const Block& block, const OneLaunch<T>& args, const Loss& loss)
      : block_(block), args_(args), loss_(loss), matrix_(args.plan.matrix), square_(block, args) {
    terms_ = square_.after();
    labels_ = reinterpret_cast<int64_t*>(terms_ + Loss::kTerms * 2 * args_.plan.edge);
  }

  FASTCL_TILE void run() {
    normalize();
    block_.grid_barrier();
    for (Side side : {kQuery, kKey}) {
      square_.load_lines(side);
      load_labels(side);
    }
    block_.barrier();
    square_.fill([&](int query, int key) { return is_excluded(loss_, matrix_, query, key); });
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
      if (sums_wanted(kQuery)) add_sums(kQuery, unit);
      if (sums_wanted(kKey)) add_sums(kKey, unit);
    }
    block_.grid_barrier();
    if (block_.index() == 0 && block_.warp() == 0) finish_scalars();
    finish_rows();
  }

 private:
  // Whether the square's columns have statistics of their own, and are not the rows again.
  FASTCL_TILE bool column_lines() const { return matrix_.two_sided && !square_.on_diagonal(); }
  // Each line's loss is added by one block only.
  FASTCL_TILE bool owns_lines(Side side) const {
    if (matrix_.symmetric) return side == kQuery && square_.on_diagonal();
    return (side == kQuery || matrix_.two_sided) && square_.position(across(side)) == 0;
  }
  FASTCL_TILE bool sums_wanted(Side side) const {
    if (matrix_.symmetric)
      return (side == kQuery || !square_.on_diagonal()) && (args_.gradients[0] || args_.gradients[1]);
    return args_.gradients[side == kQuery ? 0 : square_.input_of(matrix_.first_key)];
  }

  FASTCL_TILE float* work(int64_t offset) const { return args_.memory + offset; }
  FASTCL_TILE int64_t cells() const { return int64_t(args_.plan.slots()) * matrix_.rows; }
  // The cell of the square's line among the partial results.
  FASTCL_TILE int64_t cell(Side side, int line) const {
    return int64_t(square_.position(across(side))) * matrix_.rows + square_.row(side, line);
  }
  FASTCL_TILE float& term(Side side, int line, int which) const {
    return terms_[(which * 2 + side) * args_.plan.edge + line];
  }
  FASTCL_TILE int64_t& label(Side side, int line) const { return labels_[side * args_.plan.edge + line]; }
  FASTCL_TILE Pair pair(Side side, int line, int position) const {
    const float logit = square_.logit(side, line, position);
    if constexpr (Loss::kLabels)
      return {logit, logit != kExcluded && label(side, line) == label(across(side), position)};
    else
      return {logit, false};
  }

  // ---- phase 1 ----

  FASTCL_TILE float norm_of(int row) const { return norm(block_, square_.input_row(row), args_.plan.width); }
  FASTCL_TILE float inverse_of(int row, float norm) const {
    return args_.inputs[square_.input_of(row)].normalize ? inverse_norm(norm) : 1;
  }

  FASTCL_TILE void normalize() const {
    for (int row = block_.grid_warp(); row < matrix_.rows; row += block_.grid_warps()) {
      const float norm = norm_of(row), inverse = inverse_of(row, norm);
      if (block_.leader()) {
        work(args_.work.inverse)[row] = inverse;
        work(args_.work.length)[row] = Cell<C>::length(norm, inverse);
      }
      if constexpr (Loss::kPulls)
        if (row < matrix_.second_input) find_cosine(row, inverse);
    }
  }
  FASTCL_TILE void find_cosine(int row, float inverse) const {
    const int partner = row + matrix_.second_input;
    const T *x = square_.input_row(row), *positive = square_.input_row(partner);
    const float product = block_.warp_sum(
        args_.plan.width, [&](int d) { return static_cast<float>(x[d]) * static_cast<float>(positive[d]); });
    const float cosine = product * inverse * inverse_of(partner, norm_of(partner));
    if (block_.leader()) work(args_.work.cosine)[row] = cosine;
  }

  // ---- phase 2 ----

  FASTCL_TILE void load_labels(Side side) const {
    if constexpr (Loss::kLabels) {
      const int64_t* labels = side == kQuery ? loss_.query_labels : loss_.key_labels;
      const int first = square_.row(side, side == kQuery ? 0 : -matrix_.first_key);
      block_.template each<1>(square_.lines(side), [&](int line) {
        label(side, line) = line < square_.count(side) ? labels[first + line] : 0;
      });
    }
  }

  FASTCL_TILE void summarize(Side side) const {
    for (int line = block_.warp(); line < square_.count(side); line += kWarps)
      summarize_line(
          loss_, block_, square_.count(across(side)), [&](int i) { return pair(side, line, i); },
          [&](int statistic, float value) {
            if (block_.leader()) work(args_.work.statistics)[statistic * cells() + cell(side, line)] = value;
          });
  }

  // ---- phase 3 ----

  // Loss and weights of every line of the square.
  FASTCL_TILE void merge(Side side) const {
    block_.template each<1>(square_.lines(side), [&](int line) {
      Line<Loss> merged;
      if (line < square_.count(side) && (side == kQuery || matrix_.two_sided)) {
        merged = merged_from_squares(side, square_.row(side, line));
        if (owns_lines(side)) {
          if constexpr (Loss::kPulls) work(args_.work.pull)[square_.row(side, line)] = merged.slope;
          loss_of(side, line) = merged.loss;
        }
      }
      FASTCL_UNROLL
      for (int i = 0; i < Loss::kTerms; i++) term(side, line, i) = merged.terms[i];
    });
  }
  FASTCL_TILE Line<Loss> merged_from_squares(Side side, int row) const {
    const float* statistics = work(args_.work.statistics) + row;
    float positive = 0;
    if constexpr (Loss::kPulls)
      positive = square_.logit_scale2() *
                 work(args_.work.cosine)[row < matrix_.second_input ? row : row - matrix_.second_input];
    return merged_line(
        loss_, side == kQuery ? args_.plan.key_blocks : args_.plan.query_blocks,
        [&](int which, int slot) { return statistics[which * cells() + int64_t(slot) * matrix_.rows]; },
        positive);
  }

  // Where the tiles were staged there is room for the losses.
  FASTCL_TILE float& loss_of(Side side, int line) const {
    return square_.instead_of_tiles()[side * args_.plan.edge + line];
  }
  FASTCL_TILE void add_losses() const {
    if (block_.warp() != 0) return;
    const float sum = sum_of_losses(kQuery) + sum_of_losses(kKey);
    if (block_.leader()) work(args_.work.block_loss)[block_.index()] = sum;
  }
  FASTCL_TILE float sum_of_losses(Side side) const {
    if (!owns_lines(side)) return 0;
    return block_.warp_sum(square_.count(side), [&](int line) { return loss_of(side, line); });
  }

  FASTCL_TILE float largest_weight_of(Side side) const {
    return block_.warp_max(square_.lines(side), 1e-30f, [&](int line) {
      return largest_weight(loss_, [&](int which) { return term(side, line, which); });
    });
  }
  // Logits become their gradients, in units (returned) that bring the largest to 1 or 2: in half types they
  // would underflow, and many equal ones should be exact.
  FASTCL_TILE float form_weights() const {
    const float unit = fmaxf(largest_weight_of(kQuery), largest_weight_of(kKey));
    const float inverse_unit = 1 / unit;
    float along_scale = 0;
    for (int i = block_.warp(); i < square_.lines(kQuery); i += kWarps)
      along_scale += block_.warp_sum(square_.lines(kKey), [&](int j) {
        const Pair at = pair(kQuery, i, j);
        const float by_row = weight_of(loss_, at, [&](int which) { return term(kQuery, i, which); }),
                    by_column = weight_of(loss_, at, [&](int which) { return term(kKey, j, which); });
        const float along_row = by_row * (at.logit - term(kQuery, i, kCentre)),
                    along_column = by_column * (at.logit - term(kKey, j, kCentre));
        square_.at(kQuery, i, j).stored = static_cast<C>((by_row + by_column) * inverse_unit);
        return square_.on_diagonal() ? along_row : along_row + along_column;
      });
    if (block_.leader()) work(args_.work.along_scale)[block_.grid_warp()] = along_scale;
    return unit;
  }

  FASTCL_TILE void add_sums(Side side, float unit) const {
    square_.multiply_weights(side, [&](int line, int d, float sum) {
      work(args_.work.sums)[cell(side, line) * args_.plan.width + d] = sum * unit;
    });
  }

  // ---- phase 4 ----

  FASTCL_TILE float incoming() const { return args_.mean ? 1.0f / matrix_.queries : 1.0f; }

  FASTCL_TILE void finish_scalars() const {
    const float loss =
        block_.warp_sum(args_.plan.blocks, [&](int i) { return work(args_.work.block_loss)[i]; });
    if (block_.leader()) *args_.loss = args_.mean ? loss / matrix_.queries : loss;
    if (!args_.scale_gradient) return;
    const float sum =
        block_.warp_sum(block_.grid_warps(), [&](int i) { return work(args_.work.along_scale)[i]; });
    if (block_.leader()) *args_.scale_gradient = sum / square_.logit_scale2() * incoming();
  }

  FASTCL_TILE void finish_rows() const {
    for (int row = block_.grid_warp(); row < matrix_.rows; row += block_.grid_warps())
      if (const int input = square_.input_of(row); args_.gradients[input]) finish_row(row, input);
  }

  FASTCL_TILE void finish_row(int row, int input) const {
    const int width = args_.plan.width;
    const int64_t step = int64_t(matrix_.rows) * width;
    const bool key = row >= matrix_.first_key && row < matrix_.first_key + matrix_.keys;
    const int slots = row < matrix_.queries ? args_.plan.key_blocks : key ? args_.plan.query_blocks : 0;
    const float inverse = work(args_.work.inverse)[row];
    const T *x = square_.input_row(row), *positive = x;
    float pull = 0;  // towards the unit row of the positive
    if constexpr (Loss::kPulls)
      if (input < 2) {
        const int samples = matrix_.second_input, sample = row - input * samples,
                  partner = input == 0 ? row + samples : sample;
        const float* pulls = work(args_.work.pull);
        positive = square_.input_row(partner);
        pull = (pulls[sample] + (matrix_.two_sided ? pulls[sample + samples] : 0)) *
               work(args_.work.inverse)[partner];
      }
    float* sums = work(args_.work.sums) + int64_t(row) * width;
    const float radial = block_.warp_sum(width, [&](int d) {
      float sum = 0;
      if constexpr (Loss::kPulls) sum = -pull * static_cast<float>(positive[d]);
      for (int slot = 0; slot < slots; slot++) sum += sums[slot * step + d];
      sums[d] = sum;
      return sum * static_cast<float>(x[d]) * inverse;
    });
    const bool projected = args_.inputs[input].normalize && inverse < kLargestInverse;
    const float along = projected ? radial * inverse : 0, scale = *args_.scale * inverse * incoming();
    float* to = args_.gradients[input] + int64_t(square_.row_of_input(row, input)) * width;
    block_.warp_each(width, [&](int d) { to[d] = (sums[d] - static_cast<float>(x[d]) * along) * scale; });
  }

  const Block& block_;
  const OneLaunch<T>& args_;
  const Loss& loss_;
  const Matrix& matrix_;
  const Square<T, C> square_;
  float* terms_;     // (terms, 2, edge)
  int64_t* labels_;  // (2, edge)
};

}  // namespace FASTCL_BODY
}  // namespace fastcl::cuda
