// A block's square of the similarity matrix in shared memory, and the products it enters.
#pragma once

#include <type_traits>

#include "cuda/one_launch.h"
#include "cuda/unit_rows.cuh"

namespace fastcl::cuda {
inline namespace FASTCL_BODY {

constexpr float kExcluded = -1e38f;  // a logit that takes no part
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

enum Side { kQuery, kKey };
FASTCL_TILE Side across(Side side) { return side == kQuery ? kKey : kQuery; }

// What is known of a pair: first its cosine, in steps, then the weight of its gradient. Half types hold the
// cosine in fixed point, which loses 2^-16 of it at most; as they are they would lose 2^-12, or 2^-9, near 1.
template <class T>
struct Cell {
  static constexpr float kSteps = 32767;  // of a cosine of 1
  static constexpr uint16_t kNone = 0x8000;
  T stored;

  FASTCL_TILE void exclude() { stored.x = kNone; }
  FASTCL_TILE void set_cosine(float steps) {
    stored.x = static_cast<uint16_t>(static_cast<int16_t>(rintf(fminf(fmaxf(steps, -kSteps), kSteps))));
  }
  FASTCL_TILE float logit(float step) const {
    return stored.x == kNone ? kExcluded : static_cast<float>(static_cast<int16_t>(stored.x)) * step;
  }
  // Of two rows' product; NaN where one is not finite.
  static FASTCL_TILE float length(float norm, float inverse) { return norm * inverse; }
};

// float32 holds the product as it is: every length counts as 1.
template <>
struct Cell<float> {
  static constexpr float kSteps = 1;
  float stored;

  FASTCL_TILE void exclude() { stored = kExcluded; }
  FASTCL_TILE void set_cosine(float steps) { stored = steps; }
  FASTCL_TILE float logit(float step) const { return stored == kExcluded ? kExcluded : stored * step; }
  static FASTCL_TILE float length(float, float) { return 1; }
};

// Of rows of T, in cells of C.
template <class T, class C>
class Square {
 public:
  FASTCL_TILE Square(const Block& block, const OneLaunch<T>& args)
      : block_(block), args_(args), plan_(args.plan) {
    find_position();
    char* memory = block.shared();
    staged_[kQuery] = reinterpret_cast<T*>(memory);
    staged_[kKey] = reinterpret_cast<T*>(memory + Plan::kStagedTile);
    memory += 2 * Plan::kStagedTile;
    cells_ = reinterpret_cast<Cell<C>*>(memory);
    inverse_ = reinterpret_cast<float*>(memory + plan_.square_bytes());
    steps_ = inverse_ + 2 * plan_.edge;
    step_ = steps_ + 2 * plan_.edge;
  }

  FASTCL_TILE int position(Side side) const { return position_[side]; }
  FASTCL_TILE int count(Side side) const { return count_[side]; }
  FASTCL_TILE int row(Side side, int line) const { return first_[side] + line; }
  FASTCL_TILE bool on_diagonal() const { return plan_.matrix.symmetric && position_[0] == position_[1]; }
  // As many lines as there are in fragments that hold any.
  FASTCL_TILE int lines(Side side) const { return (count_[side] + kFragment - 1) / kFragment * kFragment; }
  // What follows the square in shared memory, and lies where tiles are staged.
  FASTCL_TILE float* after() const { return step_ + 2 * plan_.edge; }
  FASTCL_TILE float* instead_of_tiles() const { return reinterpret_cast<float*>(staged_[kQuery]); }

  // The square as lines of one side and positions on them.
  FASTCL_TILE Cell<C>& at(Side side, int line, int position) const {
    return side == kQuery ? cells_[line * plan_.pitch() + position] : cells_[position * plan_.pitch() + line];
  }
  // In log2 units.
  FASTCL_TILE float logit(Side side, int line, int position) const {
    return at(side, line, position).logit(step(side, line) * step(across(side), position));
  }

  FASTCL_TILE int input_of(int row) const {
    return row < plan_.matrix.second_input ? 0 : row < plan_.matrix.third_input ? 1 : 2;
  }
  FASTCL_TILE int row_of_input(int row, int input) const {
    return input == 0 ? row : row - (input == 1 ? plan_.matrix.second_input : plan_.matrix.third_input);
  }
  FASTCL_TILE const T* input_row(int row) const {
    const int input = input_of(row);
    return args_.inputs[input].data + int64_t(row_of_input(row, input)) * args_.inputs[input].stride;
  }

  // At zero the scale's gradient is still to be had from the logits.
  FASTCL_TILE float logit_scale2() const {
    const float scale = *args_.scale;
    return scale == 0 ? 1e-30f : scale * kLog2E;
  }

  // Of each line: its row's inverse norm; the steps of its staged row's products, and what a step is worth.
  FASTCL_TILE void load_lines(Side side) const {
    const int64_t first = first_[side];
    const float *inverses = args_.memory + args_.work.inverse + first,
                *lengths = args_.memory + args_.work.length + first;
    const float scale2 = side == kQuery ? logit_scale2() : 1, steps = side == kQuery ? Cell<C>::kSteps : 1;
    block_.template each<1>(count_[side], [&](int line) {
      inverse(side, line) = inverses[line];
      steps_[side * plan_.edge + line] = later_factor<T>(inverses[line]) * steps / lengths[line];
      step(side, line) = lengths[line] * scale2 / steps;
    });
  }

  // The cells; excluded(query, key) says of rows whether their pair is.
  template <class Excluded>
  FASTCL_TILE void fill(const Excluded& excluded) const {
    for (int query = 0; query < count_[kQuery]; query += kTile)
      for (int key = 0; key < count_[kKey]; key += kTile) fill_tile(query, key, excluded);
  }

  // Calls write(line, component, sum) for the lines' weights times the unit rows of the other side.
  template <class Write>
  FASTCL_TILE void multiply_weights(Side side, const Write& write) const {
    constexpr int kColumns = kChunk / kWarpsAcross;
    const int warp_row = block_.warp() / kWarpsAcross * kFragment,
              warp_column = block_.warp() % kWarpsAcross * kColumns;
    const Side other = across(side);
    for (int tile = 0; tile < count_[side]; tile += kTile)
      for (int from = 0; from < plan_.width; from += kChunk) {
        Accumulator<kColumns> sums;
        for (int others = 0; others < count_[other]; others += kTile) {
          stage(other, others, from);
          block_.barrier();
          for (int depth = 0; depth < kTile && others + depth < count_[other]; depth += kFragment) {
            if (tile + warp_row >= count_[side]) break;
            FragmentA<T> weights;
            weights.fill([&](int row, int i) {
              const int position = others + depth + i;
              return static_cast<float>(at(side, tile + warp_row + row, position).stored) *
                     later_factor<T>(inverse(other, position));
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
          const int line = tile + warp_row + row, d = from + warp_column + column;
          if (line < count_[side] && d < plan_.width) write(line, d, sum);
        });
      }
  }

 private:
  static constexpr int kChunk = kStageBytes / sizeof(T), kPitch = kChunk + kStagePadding / sizeof(T);
  static constexpr int kWarpsDown = kTile / kFragment, kWarpsAcross = kWarps / kWarpsDown;

  // Blocks beyond the squares help with the rows only.
  FASTCL_TILE void find_position() {
    const Matrix& matrix = plan_.matrix;
    for (Side side : {kQuery, kKey}) position_[side] = -1 - side, first_[side] = count_[side] = 0;
    if (block_.index() >= plan_.squares()) return;
    int query_block = 0, key_block = block_.index();
    while (key_block >= plan_.key_blocks) {
      query_block++;
      key_block -= plan_.key_blocks - (matrix.symmetric ? query_block : 0);
    }
    position_[kQuery] = query_block;
    position_[kKey] = key_block;
    first_[kQuery] = query_block * plan_.edge;
    first_[kKey] = matrix.first_key + key_block * plan_.edge;
    count_[kQuery] = rows_within(first_[kQuery], matrix.queries);
    count_[kKey] = rows_within(first_[kKey], matrix.first_key + matrix.keys);
  }
  FASTCL_TILE int rows_within(int first, int end) const {
    return end <= first ? 0 : end - first < plan_.edge ? end - first : plan_.edge;
  }

  FASTCL_TILE float& inverse(Side side, int line) const { return inverse_[side * plan_.edge + line]; }
  FASTCL_TILE float& step(Side side, int line) const { return step_[side * plan_.edge + line]; }

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

  template <class Excluded>
  FASTCL_TILE void fill_tile(int query, int key, const Excluded& excluded) const {
    constexpr int kColumns = kTile / kWarpsAcross;
    query += block_.warp() / kWarpsAcross * kFragment;
    key += block_.warp() % kWarpsAcross * kColumns;
    const Accumulator<kColumns> products = multiply_rows<kColumns>(query, key);
    products.each([&](int row, int column, float product) {
      const int i = query + row, j = key + column;
      if (i >= lines(kQuery) || j >= lines(kKey)) return;
      Cell<C>& cell = at(kQuery, i, j);
      if (i < count_[kQuery] && j < count_[kKey] && !excluded(first_[kQuery] + i, first_[kKey] + j))
        cell.set_cosine(steps_[i] * steps_[plan_.edge + j] * product);
      else
        cell.exclude();
    });
  }

  // The products of the warp's staged rows.
  template <int Columns>
  FASTCL_TILE Accumulator<Columns> multiply_rows(int query, int key) const {
    const int tile_row = query % kTile, tile_column = key % kTile;
    Accumulator<Columns> products;
    for (int from = 0; from < plan_.width; from += kChunk) {
      stage(kQuery, query - tile_row, from);
      stage(kKey, key - tile_column, from);
      block_.barrier();
      for (int depth = 0; depth < kChunk && from + depth < plan_.width; depth += kFragment) {
        if (query >= count_[kQuery]) break;
        FragmentA<T> x;
        x.load(staged_[kQuery] + tile_row * kPitch + depth, kPitch);
        FASTCL_UNROLL
        for (int column = 0; column < Columns; column += kFragment) {
          FragmentB<T> y;
          y.load_transposed(staged_[kKey] + (tile_column + column) * kPitch + depth, kPitch);
          products.add_product(column, x, y);
        }
      }
      block_.barrier();
    }
    return products;
  }

  const Block& block_;
  const OneLaunch<T>& args_;
  const Plan& plan_;
  int position_[2];                  // among squares, by side
  int first_[2];                     // row
  int count_[2];                     // of rows
  T* staged_[2];                     // (kTile, kPitch) each
  Cell<C>* cells_;                   // (edge, pitch)
  float *inverse_, *steps_, *step_;  // (2, edge) each
};

}  // namespace FASTCL_BODY
}  // namespace fastcl::cuda
