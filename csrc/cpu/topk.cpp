#include "cpu/topk.h"

#include <algorithm>

namespace fastcl {

namespace {

constexpr int64_t kKeyRows = 96;
constexpr int64_t kSampleStride = 16;  // one key in so many estimates the threshold

int64_t parts_for(int64_t queries, int64_t keys) {
  return ceil_div(queries, kMaxBlock) >= 8 ? 1 : std::clamp<int64_t>(ceil_div(keys, 8 * kKeyRows), 1, 8);
}

template <class T>
void scan(const Problem<T>& problem, int64_t parts, Selector<T>& selector) {
  const int64_t queries = problem.query.count, keys = problem.key.count;
  const int64_t block = std::clamp(round_up(queries, kLaneUnit), kLaneUnit, kMaxBlock),
                blocks = ceil_div(queries, block);
  for_each_task(blocks * parts, [&](int64_t task, Scratch& scratch) {
    const Kernels<T>& k = kernels<T>();
    const int64_t begin = task % blocks * block, part = task / blocks;
    const int64_t last = keys * (part + 1) / parts;
    Tile<T> tile{scratch.take<T>(kTileSlot, kKeyRows * block), block, 0, std::min(block, queries - begin)};
    T* packed = scratch.take<T>(kPackedSlot, block * problem.query.width);
    k.pack_lanes(packed, problem.query.row(begin), problem.query.stride, tile.lanes, problem.query.width,
                 problem.scale2);
    for (int64_t first = keys * part / parts; first < last; first += kKeyRows) {
      tile.rows = std::min(kKeyRows, last - first);
      int64_t key_stride;
      const T* key = problem.key.tile(first, tile.rows, kKeySlot, scratch, &key_stride);
      k.logits(tile, key, key_stride, packed, problem.query.width, nullptr);
      if (problem.exclude.row) k.exclude(tile, {problem.exclude.row + first, problem.exclude.lane + begin});
      selector.offer(tile, begin, part, first, scratch);
    }
  });
}

}  // namespace

template <class T>
Selector<T>::Selector(const Problem<T>& problem, int64_t k, int64_t parts, bool estimate)
    : queries_(problem.query.count),
      k_(k),
      parts_(parts),
      stride_(round_up(queries_, kLaneUnit)),
      threshold_(allocate_filled<T>(parts * stride_, excluded_logit<T>)),
      candidates_(parts * queries_) {
  const int64_t keys = problem.key.count, sampled = keys / kSampleStride;
  const double expected = static_cast<double>(k) / kSampleStride;
  const int64_t rank = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 4);
  if (!estimate || keys < 64 * kSampleStride || 2 * rank > sampled) return;
  estimated_ = true;
  Problem<T> sample;
  sample.query = problem.query;
  sample.key = problem.key;
  sample.key.stride *= kSampleStride;
  sample.key.count = sampled;
  sample.scale2 = problem.scale2;
  Selector<T> selector(sample, rank, parts_for(queries_, sampled), false);
  scan(sample, selector.parts_, selector);
  const Buffer<T> values = allocate<T>(queries_ * rank);
  const Buffer<int64_t> indices = allocate<int64_t>(queries_ * rank);
  selector.write(1, values.get(), indices.get());
  for (int64_t part = 0; part < parts; part++)
    for (int64_t i = 0; i < queries_; i++)
      threshold_[part * stride_ + i] = std::max(threshold_[part * stride_ + i], values[(i + 1) * rank - 1]);
}

// NaN sorts first, as in torch.topk.
template <class T>
bool Selector<T>::before(const Candidate& a, const Candidate& b) {
  if (a.value > b.value || a.value < b.value) return a.value > b.value;
  const bool a_nan = std::isnan(a.value), b_nan = std::isnan(b.value);
  return a_nan == b_nan ? a.index < b.index : a_nan;
}

// Keeps the best k; later keys must be above the worst of them (an equal one has a higher index).
template <class T>
void Selector<T>::shrink(std::vector<Candidate>& candidates, T* threshold) const {
  if (static_cast<int64_t>(candidates.size()) <= k_) return;
  std::nth_element(candidates.begin(), candidates.begin() + k_ - 1, candidates.end(), before);
  candidates.resize(k_);
  *threshold = candidates[k_ - 1].value;
}

template <class T>
void Selector<T>::offer(Tile<T> tile, int64_t query_begin, int64_t part, int64_t key_begin,
                        Scratch& scratch) {
  Selected<T> selected{scratch.take<T>(kPositiveSlot, tile.rows * tile.stride),
                       scratch.take<int32_t>(kSumSlot, 2 * tile.rows * tile.stride)};
  T* threshold = threshold_.get() + part * stride_ + query_begin;
  const int64_t count = kernels<T>().select_above(tile, threshold, selected);
  for (int64_t n = 0; n < count; n++) {
    const int32_t lane = selected.place[2 * n + 1];
    std::vector<Candidate>& candidates = candidates_[part * queries_ + query_begin + lane];
    candidates.push_back({selected.value[n], key_begin + selected.place[2 * n]});
    if (static_cast<int64_t>(candidates.size()) >= 2 * k_ + kMaxBlock) shrink(candidates, threshold + lane);
  }
}

template <class T>
bool Selector<T>::complete() const {
  for (int64_t i = 0; estimated_ && i < queries_; i++) {
    int64_t found = 0;
    for (int64_t part = 0; part < parts_; part++) found += candidates_[part * queries_ + i].size();
    if (found < k_) return false;
  }
  return true;
}

template <class T>
void Selector<T>::write(T unit, T* values, int64_t* indices) {
  for_each_range(queries_, 8, [&](int64_t begin, int64_t end, Scratch&) {
    std::vector<Candidate> all;
    for (int64_t i = begin; i < end; i++) {
      all.clear();
      for (int64_t part = 0; part < parts_; part++) {
        const auto& some = candidates_[part * queries_ + i];
        all.insert(all.end(), some.begin(), some.end());
      }
      T unused;
      shrink(all, &unused);
      std::sort(all.begin(), all.end(), before);
      const int64_t found = all.size();
      for (int64_t n = 0; n < k_; n++) {
        values[i * k_ + n] = n < found ? all[n].value / unit : -INFINITY;
        indices[i * k_ + n] = n < found ? all[n].index : -1;
      }
    }
  });
}

template <class T>
void topk(const Problem<T>& problem, int64_t k, T* values, int64_t* indices) {
  const int64_t parts = parts_for(problem.query.count, problem.key.count);
  for (bool estimate : {true, false}) {
    Selector<T> selector(problem, k, parts, estimate);
    scan(problem, parts, selector);
    if (!selector.complete()) continue;
    return selector.write(problem.scale2, values, indices);
  }
}

template class Selector<float>;
template class Selector<double>;
template void topk<float>(const Problem<float>&, int64_t, float*, int64_t*);
template void topk<double>(const Problem<double>&, int64_t, double*, int64_t*);

}  // namespace fastcl
