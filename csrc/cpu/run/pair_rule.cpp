#include "cpu/run/pair_rule.h"

#include <algorithm>
#include <cstring>

namespace fastcl::cpu {

namespace {

// Whether a pair is in a set, for the pairs of a tile: a byte each, [row][lane].
class Members {
 public:
  template <class T>
  Members(Tile<T> tile, int64_t query_begin, int64_t key_begin, uint8_t* memory)
      : rows_(tile.rows),
        lanes_(tile.lanes),
        stride_(tile.stride),
        query_begin_(query_begin),
        key_begin_(key_begin),
        table_(memory) {
    std::fill_n(table_, rows_ * stride_, uint8_t{0});
  }

  void add(const PairSets& sets) {
    for (const Ids& ids : sets.ids) add(ids);
    for (const Mask& mask : sets.masks) add(mask);
  }
  void add(Ids ids) {
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t l = 0; l < lanes_; l++) row(r)[l] |= ids.row[key_begin_ + r] == ids.lane[query_begin_ + l];
  }
  void add(const Mask& mask) {
    for (int64_t l = 0, lanes; l < lanes_; l += lanes) {  // up to where the mask repeats
      const int64_t query = (query_begin_ + l) % mask.queries;
      lanes = std::min(lanes_ - l, mask.queries - query);
      for (int64_t r = 0, rows; r < rows_; r += rows) {
        const int64_t key = (key_begin_ + r) % mask.keys;
        rows = std::min(rows_ - r, mask.keys - key);
        add_part(mask, query, key, l, lanes, r, rows);
      }
    }
  }
  void add_keys(const int64_t* keys, int64_t per_query) {
    for (int64_t l = 0; l < lanes_; l++) {
      for (int64_t n = 0; n < per_query; n++) {
        const int64_t r = keys[(query_begin_ + l) * per_query + n] - key_begin_;
        if (r >= 0 && r < rows_) row(r)[l] = 1;
      }
    }
  }
  void complement() {
    for (int64_t i = 0; i < rows_ * stride_; i++) table_[i] = !table_[i];
  }

  template <class T>
  void exclude_from(Tile<T> tile) const {
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t l = 0; l < lanes_; l++) tile.row(r)[l] = row(r)[l] ? excluded_logit<T> : tile.row(r)[l];
  }
  const uint8_t* table() const { return table_; }

 private:
  void add_part(const Mask& mask, int64_t query, int64_t key, int64_t lane, int64_t lanes, int64_t first_row,
                int64_t rows) {
    const bool in_squares = mask.key_stride == 1;
    const int64_t square_lanes = in_squares ? lanes / 8 * 8 : 0, square_rows = rows / 8 * 8;
    for (int64_t l = 0; l < lanes; l++) {
      const uint8_t* of_query = mask.data + (query + l) * mask.query_stride + key * mask.key_stride;
      if (l < square_lanes && l % 8 == 0)
        for (int64_t r = 0; r < square_rows; r += 8)
          add_square(of_query + r, mask.query_stride, first_row + r, lane + l);
      for (int64_t r = l < square_lanes ? square_rows : 0; r < rows; r++)
        row(first_row + r)[lane + l] |= of_query[r * mask.key_stride] != 0;
    }
  }

  // 8 by 8 bytes of a mask, transposed by swapping ever larger blocks across the diagonal.
  void add_square(const uint8_t* mask, int64_t query_stride, int64_t r, int64_t l) {
    uint64_t lane[8];
    for (int i = 0; i < 8; i++) std::memcpy(&lane[i], mask + i * query_stride, 8);
    constexpr uint64_t kLow[] = {0x00ff00ff00ff00ff, 0x0000ffff0000ffff, 0x00000000ffffffff};
    for (int step = 0; step < 3; step++) {
      const int half = 1 << step, shift = 8 << step;
      for (int i = 0; i < 8; i++) {
        if (i & half) continue;
        const uint64_t a = lane[i], b = lane[i + half];
        lane[i] = (a & kLow[step]) | (b & kLow[step]) << shift;
        lane[i + half] = (a >> shift & kLow[step]) | (b & ~kLow[step]);
      }
    }
    for (int i = 0; i < 8; i++) {
      uint64_t before;
      std::memcpy(&before, row(r + i) + l, 8);
      before |= lane[i];
      std::memcpy(row(r + i) + l, &before, 8);
    }
  }

  uint8_t* row(int64_t r) const { return table_ + r * stride_; }

  int64_t rows_, lanes_, stride_, query_begin_, key_begin_;
  uint8_t* table_;
};

// Whether the ranges of a tile's ids overlap: that of most tiles, where ids are numbers of rows, do not.
bool may_meet(Ids ids, int64_t rows, int64_t lanes) {
  const auto [lowest_row, highest_row] = std::minmax_element(ids.row, ids.row + rows);
  const auto [lowest_lane, highest_lane] = std::minmax_element(ids.lane, ids.lane + lanes);
  return *lowest_row <= *highest_lane && *lowest_lane <= *highest_row;
}

}  // namespace

bool is_symmetric(const Mask& mask) {
  constexpr int64_t kBlock = 64;  // rows and columns whose bytes the cache holds
  const int64_t n = mask.queries;
  if (n != mask.keys) return false;
  auto at = [&](int64_t i, int64_t j) { return mask.data[i * mask.query_stride + j * mask.key_stride] != 0; };
  for (int64_t first = 0; first < n; first += kBlock)
    for (int64_t i = first; i < n; i++) {
      bool differs = false;
      for (int64_t j = first; j < std::min(first + kBlock, i); j++) differs |= at(i, j) != at(j, i);
      if (differs) return false;
    }
  return true;
}

template <class T>
void exclude_pairs(const Problem<T>& problem, Tile<T> tile, int64_t query_begin, int64_t key_begin,
                   Scratch& scratch) {
  const Kernels<T>& k = kernels<T>();
  auto exclude_equal = [&](Ids ids) {
    const Ids own{ids.row + key_begin, ids.lane + query_begin};
    if (may_meet(own, tile.rows, tile.lanes)) k.exclude(tile, own);
  };
  auto exclude_different = [&](Ids ids) {
    k.exclude_different(tile, {ids.row + key_begin, ids.lane + query_begin});
  };
  if (problem.exclude.row) exclude_equal(problem.exclude);
  if (!problem.rule) return;
  const PairRule& rule = *problem.rule;
  for (const Ids& ids : rule.exclude.ids) exclude_equal(ids);
  if (rule.within.row) exclude_different(rule.within);
  uint8_t* const memory = scratch.take<uint8_t>(kRuleSlot, tile.rows * tile.stride);
  if (rule.only.ids.size() == 1 && rule.only.masks.empty()) {
    exclude_different(rule.only.ids[0]);
  } else if (!rule.only.empty()) {
    Members members(tile, query_begin, key_begin, memory);
    members.add(rule.only);
    members.complement();
    members.exclude_from(tile);
  }
  if (rule.exclude.masks.empty() && !rule.excluded_per_query) return;
  Members members(tile, query_begin, key_begin, memory);
  for (const Mask& mask : rule.exclude.masks) members.add(mask);
  members.add_keys(rule.exclude_keys, rule.excluded_per_query);
  members.exclude_from(tile);
}

template <class T>
bool split_pairs(const Problem<T>& problem, Tile<T> tile, Split<T> to, int64_t query_begin, int64_t key_begin,
                 PositiveSums<T> lane, PositiveSums<T> row, Scratch& scratch) {
  const Kernels<T>& k = kernels<T>();
  if (problem.positive.row) {
    const Ids ids{problem.positive.row + key_begin, problem.positive.lane + query_begin};
    if (!may_meet(ids, tile.rows, tile.lanes)) return false;
    k.split(tile, to, ids, lane, row);
    return true;
  }
  Members members(tile, query_begin, key_begin, scratch.take<uint8_t>(kRuleSlot, tile.rows * tile.stride));
  members.add(problem.rule->positive);
  k.split_members(tile, to, members.table(), lane, row);
  return true;
}

#define FASTCL_INSTANTIATE(T)                                                                           \
  template void exclude_pairs<T>(const Problem<T>&, Tile<T>, int64_t, int64_t, Scratch&);               \
  template bool split_pairs<T>(const Problem<T>&, Tile<T>, Split<T>, int64_t, int64_t, PositiveSums<T>, \
                               PositiveSums<T>, Scratch&);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)

}  // namespace fastcl::cpu
