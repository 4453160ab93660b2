#include "cpu/stats.h"

#include "cpu/products.h"

namespace fastcl {

namespace {

constexpr int64_t kMaxKeptBytes = int64_t{48} << 20;
constexpr int64_t kMinKeptShare = 8;  // at least one tile in so many, or none

// Walks the tiles of a task and makes their logits, with the pair rule applied, or finds them made.
template <class T>
class TileWalk {
 public:
  TileWalk(const Problem<T>& problem, const Plan& plan, int64_t task, Scratch& scratch,
           const KeptTiles<T>& kept, bool made)
      : problem_(problem), plan_(plan), task_(task), kept_(kept), made_(made) {
    spare_ = scratch.take<T>(kTileSlot, plan.block * plan.block);
    tile_.stride = plan.block;
    positive_ = tile_;
    if (problem.positive.row) positive_.s = scratch.take<T>(kPositiveSlot, plan.block * plan.block);
    products_ = make_products(problem, plan.block, plan.block, scratch);
    unused_ = scratch.take<T>(kSumSlot, 2 * plan.block);
    std::fill_n(unused_, 2 * plan.block, T(0));
  }

  // body(tile, positive, query_begin, key_begin) for each tile; `lane` and `row` receive the positives' sums
  // and counts where given.
  template <class Body>
  void run(const State<T>* lane, const State<T>* row, const Body& body) {
    const int64_t part = plan_.key_part(task_);
    plan_.for_query_blocks(plan_.query_part(task_), [&](int64_t block) {
      const int64_t begin = block * plan_.block;
      tile_.lanes = std::min(plan_.block, problem_.query.count - begin);
      products_->set_lanes(begin, tile_.lanes);
      const int64_t first = problem_.symmetric ? block : plan_.key_begin(part);
      for (int64_t j = first; j < plan_.key_end(part); j++) {
        const int64_t key_begin = j * plan_.block;
        tile_.rows = std::min(plan_.block, problem_.key.count - key_begin);
        products_->set_rows(key_begin, tile_.rows);
        T* const kept = kept_.tile(block, j);
        tile_.s = kept ? kept : spare_;
        if (!kept || !made_)
          make_logits(begin, key_begin, lane, problem_.symmetric && j == block ? nullptr : row);
        body(tile_, positive_, begin, key_begin);
      }
    });
  }
  // Of the present tile.
  Products<T>& products() { return *products_; }

 private:
  void make_logits(int64_t begin, int64_t key_begin, const State<T>* lane, const State<T>* row) {
    const Problem<T>& p = problem_;
    products_->logits(tile_);
    if (p.exclude.row) k_.exclude(tile_, {p.exclude.row + key_begin, p.exclude.lane + begin});
    if (!p.positive.row) return;
    positive_.rows = tile_.rows;
    positive_.lanes = tile_.lanes;
    auto sums = [&](const State<T>* state, int field, int64_t offset) {
      return state ? state->field(field) + offset
                   : unused_ + (field == State<T>::kPosCount ? plan_.block : 0);
    };
    k_.split(tile_, positive_, {p.positive.row + key_begin, p.positive.lane + begin},
             sums(lane, State<T>::kPosTotal, begin), sums(lane, State<T>::kPosCount, begin),
             sums(row, State<T>::kPosTotal, key_begin), sums(row, State<T>::kPosCount, key_begin));
  }

  const Problem<T>& problem_;
  const Plan& plan_;
  const int64_t task_;
  const KeptTiles<T>& kept_;
  const bool made_;
  const Kernels<T>& k_ = kernels<T>();
  std::unique_ptr<Products<T>> products_;
  Tile<T> tile_, positive_;
  T *spare_, *unused_;
};

template <class T>
State<T> merge_parts(std::vector<State<T>> parts, int64_t count) {
  if (parts.size() > 1) {
    for_each_range(count, 4096, [&](int64_t begin, int64_t end, Scratch&) {
      for (size_t p = 1; p < parts.size(); p++) merge_state(parts[0], parts[p], begin, end);
    });
  }
  return std::move(parts[0]);
}

template <class T>
void clear(const Partials<T>& partials, int64_t part, int64_t begin, int64_t end) {
  if (partials) std::fill(partials.row(part, begin), partials.row(part, end), T(0));
}

}  // namespace

template <class T>
KeptTiles<T> make_kept_tiles(const Problem<T>& problem) {
  KeptTiles<T> kept;
  kept.plan =
      make_plan(problem.query.count, problem.key.count, problem.query.width, problem.symmetric, kSumParts);
  kept.symmetric = problem.symmetric;
  const int64_t blocks = kept.plan.query_blocks, block = kept.plan.block;
  const int64_t tiles = problem.symmetric ? blocks * (blocks + 1) / 2 : blocks * kept.plan.key_blocks;
  const int64_t affordable = kMaxKeptBytes / (block * block * static_cast<int64_t>(sizeof(T)));
  if (affordable * kMinKeptShare < tiles) return kept;
  kept.capacity = std::min(tiles, affordable);
  kept.tiles = allocate<T>(kept.capacity * block * block);
  return kept;
}

template <class T>
Statistics<T> statistics(const Problem<T>& problem, bool columns, const KeptTiles<T>& keep) {
  const int64_t queries = problem.query.count, keys = problem.key.count;
  const Plan plan =
      keep ? keep.plan : make_plan(queries, keys, problem.query.width, problem.symmetric, kStateParts);
  std::vector<State<T>> lane_parts, row_parts;
  for (int64_t p = 0; p < (problem.symmetric ? plan.query_parts : plan.key_parts); p++)
    lane_parts.push_back(make_state<T>(queries));
  for (int64_t p = 0; columns && p < plan.query_parts; p++) row_parts.push_back(make_state<T>(keys));

  for_each_task(plan.tasks(), [&](int64_t task, Scratch& scratch) {
    const Kernels<T>& k = kernels<T>();
    const int64_t query_part = plan.query_part(task);
    const State<T>& lane = lane_parts[problem.symmetric ? query_part : plan.key_part(task)];
    const State<T>* row = problem.symmetric ? &lane : columns ? &row_parts[query_part] : nullptr;
    TileWalk<T>(problem, plan, task, scratch, keep, false)
        .run(&lane, row, [&](Tile<T> tile, Tile<T> positive, int64_t begin, int64_t key_begin) {
          const bool both = columns || (problem.symmetric && begin != key_begin);
          if (both)
            k.both_log_sum(tile, lane.negative(begin), row->negative(key_begin));
          else
            k.lane_log_sum(tile, lane.negative(begin));
          if (!problem.positive.row) return;
          if (both)
            k.both_log_sum(positive, lane.positive(begin), row->positive(key_begin));
          else
            k.lane_log_sum(positive, lane.positive(begin));
        });
  });
  Statistics<T> result;
  result.rows = merge_parts(std::move(lane_parts), queries);
  if (columns) result.columns = merge_parts(std::move(row_parts), keys);
  return result;
}

template <class T>
SideWeights<T> make_side_weights(int64_t count) {
  const int64_t stride = round_up(count, kLaneUnit);
  SideWeights<T> weights{allocate_filled<T>(SideWeights<T>::kFields * stride, T(0)), stride};
  for (int f : {SideWeights<T>::kNegMax, SideWeights<T>::kPosMax})
    std::fill_n(weights.field(f), stride, excluded_logit<T>);
  return weights;
}

template <class T>
PairSums<T> pair_sums(const Problem<T>& problem, const SideWeights<T>& rows, const SideWeights<T>& columns,
                      Wanted wanted, const KeptTiles<T>& kept) {
  const int64_t queries = problem.query.count, keys = problem.key.count;
  const int64_t width = round_up(problem.query.width, kernels<T>().vector);
  const bool symmetric = problem.symmetric;
  const Plan plan = kept ? kept.plan : make_plan(queries, keys, problem.query.width, symmetric, kSumParts);
  PairSums<T> sums;
  if (wanted.query)
    sums.query = make_partials<T>(symmetric ? plan.query_parts : plan.key_parts, queries, width);
  if (wanted.key) sums.key = make_partials<T>(plan.query_parts, keys, width);
  if (wanted.bias) sums.bias = make_partials<T>(plan.query_parts, keys, 1);

  for_each_task(plan.tasks(), [&](int64_t task, Scratch& scratch) {
    const Kernels<T>& k = kernels<T>();
    const int64_t query_part = plan.query_part(task), key_part = plan.key_part(task);
    const int64_t first = plan.key_begin(key_part) * plan.block;
    const int64_t last = std::min(keys, plan.key_end(key_part) * plan.block);
    clear(sums.key, query_part, first, last);
    clear(sums.bias, query_part, first, last);
    if (symmetric) {
      clear(sums.query, query_part, 0, queries);
    } else {
      plan.for_query_blocks(query_part, [&](int64_t block) {
        clear(sums.query, key_part, block * plan.block, std::min(queries, (block + 1) * plan.block));
      });
    }
    const Partials<T>& row_out = symmetric ? sums.query : sums.key;
    const SideWeights<T>& row_weights = symmetric ? rows : columns;
    TileWalk<T> walk(problem, plan, task, scratch, kept, static_cast<bool>(kept));
    walk.run(nullptr, nullptr, [&](Tile<T> tile, Tile<T> positive, int64_t begin, int64_t key_begin) {
      if (problem.positive.row) {
        const auto lane_pair = rows.pair(begin);
        const auto row_pair = row_weights ? row_weights.pair(key_begin) : lane_pair;
        k.pair_weights(tile, positive, &lane_pair, row_weights ? &row_pair : nullptr);
      } else if (row_weights) {
        k.both_weights(tile, rows.negative(begin), row_weights.negative(key_begin));
      } else {
        k.lane_weights(tile, rows.negative(begin));
      }
      if (sums.query)
        walk.products().add_to_lanes(tile, sums.query.row(symmetric ? query_part : key_part, begin));
      if (symmetric ? begin != key_begin : static_cast<bool>(sums.key))
        walk.products().add_to_rows(tile, row_out.row(query_part, key_begin));
      if (sums.bias)
        for (int64_t r = 0; r < tile.rows; r++)
          for (int64_t i = 0; i < tile.lanes; i++)
            *sums.bias.row(query_part, key_begin + r) += tile.row(r)[i];
    });
  });
  return sums;
}

#define FASTCL_INSTANTIATE(T)                                                                                \
  template KeptTiles<T> make_kept_tiles<T>(const Problem<T>&);                                               \
  template Statistics<T> statistics<T>(const Problem<T>&, bool, const KeptTiles<T>&);                        \
  template SideWeights<T> make_side_weights<T>(int64_t);                                                     \
  template PairSums<T> pair_sums<T>(const Problem<T>&, const SideWeights<T>&, const SideWeights<T>&, Wanted, \
                                    const KeptTiles<T>&);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)

}  // namespace fastcl
