#include "cpu/losses/attend.h"

#include "cpu/run/pair_rule.h"
#include "cpu/run/products.h"

namespace fastcl::cpu {

namespace {

constexpr int64_t kKeyRows = 192;                  // keys per tile
constexpr int64_t kStripLanes = 64;                // queries per strip: it should stay in the cache
constexpr int64_t kStripBytes = int64_t{4} << 20;  // beyond, it does not, and is twice as wide
constexpr int64_t kMaxStrip = int64_t{16} << 20;

template <class T>
void block_logits(const Problem<T>& problem, Products<T>& products, Tile<T> tile, int64_t query_begin,
                  int64_t key_begin, Scratch& scratch) {
  products.logits(tile);
  exclude_pairs(problem, tile, query_begin, key_begin, scratch);
}

// Rescales what was summed relative to `before` to be relative to `now`.
template <class T>
void rescale(int64_t lanes, const T* before, const T* now, T* sum, T* out, int64_t width) {
  for (int64_t i = 0; i < lanes; i++) {
    if (before[i] == now[i]) continue;
    const T factor = is_empty(before[i]) ? T(0) : std::exp2(before[i] - now[i]);
    sum[i] *= factor;
    for (int64_t d = 0; d < width; d++) out[i * width + d] *= factor;
  }
}

template <class T>
void attend_block(const Problem<T>& problem, Selector<T>* selector, int64_t part, int64_t begin,
                  int64_t lanes, int64_t block, int64_t key_first, int64_t key_last, LogSum<T> state, T* out,
                  int64_t width, Scratch& scratch) {
  const Kernels<T>& k = kernels<T>();
  const auto products = make_products(problem, kKeyRows, block, scratch);
  T* before = scratch.take<T>(kQuerySlot, block);
  Tile<T> tile{scratch.take<T>(kTileSlot, kKeyRows * block), block, 0, lanes};
  std::fill_n(out, lanes * width, T(0));
  products->set_lanes(begin, lanes);
  for (int64_t key_begin = key_first; key_begin < key_last; key_begin += kKeyRows) {
    tile.rows = std::min(kKeyRows, key_last - key_begin);
    products->set_rows(key_begin, tile.rows);
    block_logits(problem, *products, tile, begin, key_begin, scratch);
    if (selector) selector->offer(tile, begin, part, key_begin, scratch);
    std::copy_n(state.max, lanes, before);
    k.lane_max(tile, state.max);
    rescale(lanes, before, state.max, state.sum.sum, out, width);
    k.exponentiate(tile, state.max, state.sum.sum);
    products->add_to_lanes(tile, out);
  }
}

}  // namespace

template <class T>
Attended<T> attend(const Problem<T>& problem, Selector<T>* selector) {
  const int64_t queries = problem.query.count, keys = problem.key.count;
  const int64_t width = round_up(problem.query.width, kernels<T>().vector);
  const int64_t block = even_block(queries, kMaxBlock), blocks = ceil_div(queries, block);
  const int64_t key_parts = parts_of_keys(queries, keys);
  std::vector<State<T>> states;
  for (int64_t p = 0; p < key_parts; p++) states.push_back(make_state<T>(queries));
  Partials<T> sums = make_partials<T>(key_parts, queries, width);

  for_each_task(blocks * key_parts, [&](int64_t task, Scratch& scratch) {
    const int64_t begin = task % blocks * block, part = task / blocks;
    attend_block(problem, selector, part, begin, std::min(block, queries - begin), block,
                 keys * part / key_parts, keys * (part + 1) / key_parts, states[part].negative(begin),
                 sums.row(part, begin), width, scratch);
  });
  if (key_parts == 1) return {std::move(states[0]), std::move(sums)};

  Attended<T> result{make_state<T>(queries), make_partials<T>(1, queries, width)};
  for_each_range(queries, 64, [&](int64_t begin, int64_t end, Scratch&) {
    for (const State<T>& part : states) merge_state(result.rows, part, begin, end);
    for (int64_t i = begin; i < end; i++) {
      T* out = result.query.row(0, i);
      std::fill_n(out, width, T(0));
      for (int64_t p = 0; p < key_parts; p++) {
        const T max = *states[p].negative(i).max;
        if (is_empty(max) && !std::isnan(states[p].negative(i).total())) continue;
        kernels<T>().add_scaled(out, sums.row(p, i), std::exp2(max - *result.rows.negative(i).max), width);
      }
    }
  });
  return result;
}

template <class T>
int64_t strip_lanes(const Problem<T>& problem) {
  const bool wide = problem.key.count * kStripLanes * static_cast<int64_t>(sizeof(T)) >= kStripBytes &&
                    problem.query.count >= 4 * kStripLanes;
  return wide ? 2 * kStripLanes : kStripLanes;
}

template <class T>
bool strips_fit(const Problem<T>& problem) {
  return problem.key.count * strip_lanes(problem) * static_cast<int64_t>(sizeof(T)) <= kMaxStrip &&
         problem.query.count >= 2 * kStripLanes;
}

template <class T>
AttendedKeys<T> attend_with_keys(const Problem<T>& problem, const std::function<T(int64_t, T, T)>& factor) {
  const int64_t queries = problem.query.count, keys = problem.key.count;
  const int64_t width = round_up(problem.query.width, kernels<T>().vector);
  const int64_t block = strip_lanes(problem), blocks = ceil_div(queries, block);
  AttendedKeys<T> result{{make_state<T>(queries), make_partials<T>(1, queries, width)},
                         make_partials<T>(1, keys, width)};
  Turns turns(ceil_div(keys, kKeyRows));  // the strips add to the keys of a tile one after the other

  for_each_task(blocks, turns.guarded([&](int64_t b, Scratch& scratch) {
    const Kernels<T>& k = kernels<T>();
    const auto products = make_products(problem, kKeyRows, block, scratch);
    T* factors = scratch.take<T>(kQuerySlot, block);
    T* strip = scratch.take<T>(kTileSlot, keys * block);
    const int64_t begin = b * block, lanes = std::min(block, queries - begin);
    const LogSum<T> state = result.queries.rows.negative(begin);
    T* out = result.queries.query.row(0, begin);
    std::fill_n(out, lanes * width, T(0));
    auto for_tiles = [&](const auto& body) {
      for (int64_t first = 0; first < keys; first += kKeyRows) {
        const Tile<T> tile{strip + first * block, block, std::min(kKeyRows, keys - first), lanes};
        products->set_rows(first, tile.rows);
        body(tile, first);
      }
    };
    products->set_lanes(begin, lanes);
    for_tiles([&](Tile<T> tile, int64_t first) {
      block_logits(problem, *products, tile, begin, first, scratch);
      k.lane_max(tile, state.max);
    });
    for_tiles([&](Tile<T> tile, int64_t) {
      k.exponentiate(tile, state.max, state.sum.sum);
      products->add_to_lanes(tile, out);
    });
    for (int64_t i = 0; i < lanes; i++) factors[i] = factor(begin + i, state.max[i], state.sum.sum[i]);
    products->scale_lanes(factors);
    for_tiles([&](Tile<T> tile, int64_t first) {
      turns.take(first / kKeyRows, b, [&] {
        T* const key_out = result.key.row(0, first);
        if (b == 0) std::fill_n(key_out, tile.rows * width, T(0));
        products->add_to_rows(tile, key_out);
      });
    });
  }));
  return result;
}

#define FASTCL_INSTANTIATE(T)                                      \
  template Attended<T> attend<T>(const Problem<T>&, Selector<T>*); \
  template bool strips_fit<T>(const Problem<T>&);                  \
  template AttendedKeys<T> attend_with_keys<T>(const Problem<T>&, const std::function<T(int64_t, T, T)>&);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)

}  // namespace fastcl::cpu
