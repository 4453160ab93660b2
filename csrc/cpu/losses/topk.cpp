#include "cpu/losses/topk.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "cpu/run/pair_rule.h"
#include "cpu/run/products.h"

namespace fastcl::cpu {

namespace {

constexpr int64_t kKeyRows = 96;
constexpr int64_t kSampleStride = 16;  // at least one key in so many estimates the threshold
constexpr int64_t kMaxSample =
    16384;  // the similarities of a block of queries to them should stay in the cache
constexpr int64_t kSampleLanes = 32;

// Similarities, times a sign, that are not below their lane's bound.
template <class T>
void exclude_not_below(Tile<T> tile, const T* below, T sign) {
  for (int64_t r = 0; r < tile.rows; r++)
    for (int64_t i = 0; i < tile.lanes; i++)
      if (tile.row(r)[i] * sign >= below[i]) tile.row(r)[i] = excluded_logit<T>;
}

template <class T>
void scan(const Problem<T>& problem, int64_t parts, const T* below, Selector<T>& selector) {
  const int64_t queries = problem.query.count, keys = problem.key.count;
  const int64_t block = std::clamp(round_up(queries, kLaneUnit), kLaneUnit, kMaxBlock),
                blocks = ceil_div(queries, block);
  for_each_task(blocks * parts, [&](int64_t task, Scratch& scratch) {
    const int64_t begin = task % blocks * block, part = task / blocks;
    const int64_t last = keys * (part + 1) / parts;
    Tile<T> tile{scratch.take<T>(kTileSlot, kKeyRows * block), block, 0, std::min(block, queries - begin)};
    const auto products = make_products(problem, kKeyRows, block, scratch);
    products->set_lanes(begin, tile.lanes);
    for (int64_t first = keys * part / parts; first < last; first += kKeyRows) {
      tile.rows = std::min(kKeyRows, last - first);
      products->set_rows(first, tile.rows);
      products->logits(tile);
      exclude_pairs(problem, tile, begin, first, scratch);
      if (below) exclude_not_below(tile, below + begin, problem.scale2);
      selector.offer(tile, begin, part, first, scratch);
    }
  });
}

template <class T>
constexpr Order<T> kSign = ~(std::numeric_limits<Order<T>>::max() >> 1);

template <class T>
Order<T> order_of(T value) {
  if (std::isnan(value)) return 0;
  const auto bits = std::bit_cast<Order<T>>(value + T(0));  // one zero only
  return bits & kSign<T> ? bits : ~kSign<T> - bits;
}

template <class T>
T value_of(Order<T> order) {
  if (order == 0) return std::numeric_limits<T>::quiet_NaN();
  return std::bit_cast<T>(order & kSign<T> ? order : ~kSign<T> - order);
}

// For each query a value that `rank` of `sampled` evenly chosen keys lie above.
template <class T>
void estimate_thresholds(const Problem<T>& problem, int64_t sampled, int64_t rank, T* thresholds) {
  Problem<T> sample = problem;
  const int64_t step = problem.key.count / sampled;
  sample.key.stride *= step;
  Buffer<float> factor;
  if (problem.bfloat16.parts) {
    sample.bfloat16.key.stride *= step;
    factor = allocate<float>(sampled);
    for (int64_t j = 0; j < sampled; j++) factor[j] = problem.bfloat16.key.factor[j * step];
    sample.bfloat16.key.factor = factor.get();
  }
  for_each_range(problem.query.count, kSampleLanes, [&](int64_t begin, int64_t end, Scratch& scratch) {
    Tile<T> all{scratch.take<T>(kTileSlot, sampled * kSampleLanes), kSampleLanes, sampled, end - begin};
    const auto products = make_products(sample, kKeyRows, kSampleLanes, scratch);
    products->set_lanes(begin, all.lanes);
    for (int64_t first = 0; first < sampled; first += kKeyRows) {
      const Tile<T> tile{all.row(first), kSampleLanes, std::min(kKeyRows, sampled - first), all.lanes};
      products->set_rows(first, tile.rows);
      products->logits(tile);
    }
    kernels<T>().lane_quantile(all, rank, thresholds + begin);
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
  const int64_t keys = problem.key.count, sampled = std::min(keys / kSampleStride, kMaxSample);
  const double expected = static_cast<double>(k) * sampled / std::max<int64_t>(keys, 1);
  const int64_t rank = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 4);
  if (!estimate || keys < 64 * kSampleStride || 2 * rank > sampled) return;
  estimated_ = true;
  estimate_thresholds(problem, sampled, rank, threshold_.get());
  for (int64_t part = 1; part < parts; part++)
    std::copy_n(threshold_.get(), queries_, threshold_.get() + part * stride_);
}

// Keeps the best k; later keys must be above the worst of them (an equal one has a higher index).
template <class T>
void Selector<T>::shrink(std::vector<Candidate>& candidates, T* threshold) const {
  std::vector<Order<T>> orders;
  orders.reserve(candidates.size());
  for (const Candidate& candidate : candidates) orders.push_back(candidate.order);
  std::nth_element(orders.begin(), orders.begin() + k_ - 1, orders.end());
  const Order<T> last = orders[k_ - 1];
  int64_t equal = k_ - std::count_if(orders.begin(), orders.begin() + k_, [&](auto o) { return o < last; });
  std::erase_if(candidates, [&](const Candidate& candidate) {
    return candidate.order > last || (candidate.order == last && equal-- <= 0);
  });
  *threshold = value_of<T>(last);
}

// Byte by byte from the lowest: stable, so that of equal values the lower index stays first.
template <class T>
void Selector<T>::sort(std::vector<Candidate>& candidates, std::vector<Candidate>& spare) {
  spare.resize(candidates.size());
  for (size_t byte = 0; byte < sizeof(T); byte++) {
    size_t place[257] = {};
    auto digit = [&](const Candidate& candidate) { return candidate.order >> (8 * byte) & 255; };
    for (const Candidate& candidate : candidates) place[digit(candidate) + 1]++;
    for (int i = 0; i < 256; i++) place[i + 1] += place[i];
    for (const Candidate& candidate : candidates) spare[place[digit(candidate)]++] = candidate;
    candidates.swap(spare);
  }
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
    candidates.push_back({order_of(selected.value[n]), key_begin + selected.place[2 * n]});
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
    std::vector<Candidate> all, spare;
    for (int64_t i = begin; i < end; i++) {
      all.clear();
      for (int64_t part = 0; part < parts_; part++) {
        const auto& some = candidates_[part * queries_ + i];
        all.insert(all.end(), some.begin(), some.end());
      }
      sort(all, spare);
      const int64_t found = all.size();
      for (int64_t n = 0; n < k_; n++) {
        values[i * k_ + n] = (n < found ? value_of<T>(all[n].order) : -INFINITY) / unit;
        indices[i * k_ + n] = n < found ? all[n].index : -1;
      }
    }
  });
}

template <class T>
void topk(const Problem<T>& problem, int64_t k, T* values, int64_t* indices, const T* below) {
  const int64_t parts = parts_of_keys(problem.query.count, problem.key.count);
  for (bool estimate : {true, false}) {
    Selector<T> selector(problem, k, parts, estimate);
    scan(problem, parts, below, selector);
    if (!selector.complete()) continue;
    return selector.write(problem.scale2, values, indices);
  }
}

template class Selector<float>;
template class Selector<double>;
template void topk<float>(const Problem<float>&, int64_t, float*, int64_t*, const float*);
template void topk<double>(const Problem<double>&, int64_t, double*, int64_t*, const double*);

}  // namespace fastcl::cpu
