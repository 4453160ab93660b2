#include "cpu/run/pair_rule.h"

#include <algorithm>

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
    for (const Ids& ids : sets.ids) add(ids, true);
    for (const Mask& mask : sets.masks) add(mask);
  }
  // The pairs whose ids are equal, or are not.
  void add(Ids ids, bool equal) {
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t l = 0; l < lanes_; l++)
        row(r)[l] |= (ids.row[key_begin_ + r] == ids.lane[query_begin_ + l]) == equal;
  }
  void add(const Mask& mask) {
    for (int64_t l = 0; l < lanes_; l++) {
      const uint8_t* of_query = mask.data + (query_begin_ + l) % mask.queries * mask.query_stride;
      for (int64_t r = 0, key = key_begin_ % mask.keys; r < rows_; r++) {
        row(r)[l] |= of_query[key * mask.key_stride] != 0;
        key = key + 1 == mask.keys ? 0 : key + 1;
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

template <class T>
void exclude_pairs(const Problem<T>& problem, Tile<T> tile, int64_t query_begin, int64_t key_begin,
                   Scratch& scratch) {
  if (problem.exclude.row) {
    const Ids ids{problem.exclude.row + key_begin, problem.exclude.lane + query_begin};
    if (may_meet(ids, tile.rows, tile.lanes)) kernels<T>().exclude(tile, ids);
  }
  if (!problem.rule) return;
  const PairRule& rule = *problem.rule;
  uint8_t* const memory = scratch.take<uint8_t>(kRuleSlot, tile.rows * tile.stride);
  if (!rule.only.empty()) {
    Members members(tile, query_begin, key_begin, memory);
    members.add(rule.only);
    members.complement();
    members.exclude_from(tile);
  }
  if (rule.exclude.empty() && !rule.within.row && !rule.excluded_per_query) return;
  Members members(tile, query_begin, key_begin, memory);
  members.add(rule.exclude);
  if (rule.within.row) members.add(rule.within, false);
  members.add_keys(rule.exclude_keys, rule.excluded_per_query);
  members.exclude_from(tile);
}

template <class T>
bool split_pairs(const Problem<T>& problem, Tile<T> tile, Tile<T> positive, int64_t query_begin,
                 int64_t key_begin, PositiveSums<T> lane, PositiveSums<T> row, Scratch& scratch) {
  const Kernels<T>& k = kernels<T>();
  if (problem.positive.row) {
    const Ids ids{problem.positive.row + key_begin, problem.positive.lane + query_begin};
    if (!may_meet(ids, tile.rows, tile.lanes)) return false;
    k.split(tile, positive, ids, lane, row);
    return true;
  }
  Members members(tile, query_begin, key_begin, scratch.take<uint8_t>(kRuleSlot, tile.rows * tile.stride));
  members.add(problem.rule->positive);
  k.split_members(tile, positive, members.table(), lane, row);
  return true;
}

#define FASTCL_INSTANTIATE(T)                                                                          \
  template void exclude_pairs<T>(const Problem<T>&, Tile<T>, int64_t, int64_t, Scratch&);              \
  template bool split_pairs<T>(const Problem<T>&, Tile<T>, Tile<T>, int64_t, int64_t, PositiveSums<T>, \
                               PositiveSums<T>, Scratch&);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)

}  // namespace fastcl::cpu
