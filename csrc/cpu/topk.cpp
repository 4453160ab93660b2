#include "cpu/topk.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace fastcl {

namespace {

template <class T>
struct Candidate {
  T value;
  int64_t index;
};
// NaN sorts first, as in torch.topk; ties to the lower index.
template <class T>
bool before(const Candidate<T>& a, const Candidate<T>& b) {
  const bool a_nan = std::isnan(a.value), b_nan = std::isnan(b.value);
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.value != b.value) return a.value > b.value;
  return a.index < b.index;
}

// The best k so far of one query, with room to collect more before the next selection.
template <class T>
class Best {
 public:
  explicit Best(int64_t k) : k_(k) {}

  void offer(const T* logits, int64_t count, int64_t first, T* values, int64_t* indices) {
    const int64_t kept = kernels<T>().select_above(logits, count, threshold_, first, values, indices);
    for (int64_t i = 0; i < kept; i++) candidates_.push_back({values[i], indices[i]});
    if (static_cast<int64_t>(candidates_.size()) >= 2 * k_ + kMaxBlock) shrink();
  }
  // Keeps the best k; later keys must be above the worst of them (an equal one has a higher index).
  void shrink() {
    if (static_cast<int64_t>(candidates_.size()) <= k_) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + k_ - 1, candidates_.end(), before<T>);
    candidates_.resize(k_);
    threshold_ = candidates_[k_ - 1].value;
  }
  void append_to(std::vector<Candidate<T>>& all) {
    shrink();
    all.insert(all.end(), candidates_.begin(), candidates_.end());
  }

 private:
  int64_t k_;
  T threshold_ = excluded_logit<T> / 2;
  std::vector<Candidate<T>> candidates_;
};

}  // namespace

// Queries are the rows here and keys the lanes: a query's logits lie side by side.
template <class T>
void topk(const Problem<T>& problem, int64_t k, T* values, int64_t* indices) {
  const int64_t queries = problem.query.count, keys = problem.key.count;
  constexpr int64_t kRows = 128, kLanesPerTile = 256;
  const int64_t blocks = ceil_div(queries, kRows);
  const int64_t parts = blocks >= 8 ? 1 : std::clamp<int64_t>(ceil_div(keys, 8 * kLanesPerTile), 1, 8);
  std::vector<std::vector<Best<T>>> best(parts, std::vector<Best<T>>(queries, Best<T>(k)));

  for_each_task(blocks * parts, [&](int64_t task, Scratch& scratch) {
    const Kernels<T>& kernel = kernels<T>();
    const int64_t begin = task % blocks * kRows, part = task / blocks;
    const int64_t key_last = keys * (part + 1) / parts;
    T* packed = scratch.take<T>(kPackedSlot, kLanesPerTile * problem.query.width);
    T* selected = scratch.take<T>(kSumSlot, kLanesPerTile);
    int64_t* selected_index = scratch.take<int64_t>(kPositiveSlot, kLanesPerTile);
    Tile<T> tile{scratch.take<T>(kTileSlot, kRows * kLanesPerTile), kLanesPerTile, std::min(kRows, queries - begin), 0};
    for (int64_t first = keys * part / parts; first < key_last; first += kLanesPerTile) {
      tile.lanes = std::min(kLanesPerTile, key_last - first);
      int64_t key_stride;
      const T* key = problem.key.tile(first, tile.lanes, kKeySlot, scratch, &key_stride);
      kernel.pack_lanes(packed, key, key_stride, tile.lanes, problem.query.width, T(1));
      kernel.logits(tile, problem.query.row(begin), problem.query.stride, packed, problem.query.width, nullptr);
      if (problem.exclude.row) kernel.exclude(tile, {problem.exclude.lane + begin, problem.exclude.row + first});
      for (int64_t r = 0; r < tile.rows; r++)
        best[part][begin + r].offer(tile.row(r), tile.lanes, first, selected, selected_index);
    }
  });

  for_each_range(queries, 16, [&](int64_t begin, int64_t end, Scratch&) {
    std::vector<Candidate<T>> all;
    for (int64_t i = begin; i < end; i++) {
      all.clear();
      for (auto& part : best) part[i].append_to(all);
      const int64_t found = std::min<int64_t>(k, all.size());
      std::partial_sort(all.begin(), all.begin() + found, all.end(), before<T>);
      for (int64_t n = 0; n < k; n++) {
        values[i * k + n] = n < found ? all[n].value : -INFINITY;
        indices[i * k + n] = n < found ? all[n].index : -1;
      }
    }
  });
}

template void topk<float>(const Problem<float>&, int64_t, float*, int64_t*);
template void topk<double>(const Problem<double>&, int64_t, double*, int64_t*);

}  // namespace fastcl
