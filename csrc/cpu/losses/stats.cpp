#include "cpu/losses/stats.h"

#include <numeric>

#include "cpu/losses/tile_walk.h"

namespace fastcl::cpu {

namespace {

constexpr int64_t kMaxKeptBytes = int64_t{72} << 20;  // all tiles of 4,096 by 4,096 pairs
constexpr int64_t kMinKeptShare = 8;                  // at least one tile in so many, or none

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
  kept.plan = plan_of(problem);
  const int64_t blocks = kept.plan.query.blocks, block = kept.plan.query.block;
  const int64_t tiles = problem.symmetric ? blocks * (blocks + 1) / 2 : blocks * kept.plan.key.blocks;
  const int64_t affordable = kMaxKeptBytes / (block * block * static_cast<int64_t>(sizeof(T)));
  if (affordable * kMinKeptShare < tiles) return kept;
  kept.capacity = std::min(tiles, affordable);
  kept.tiles = allocate<T>(kept.capacity * block * block);
  return kept;
}

template <class T>
Statistics<T> statistics(const Problem<T>& problem, bool columns, const KeptTiles<T>& keep) {
  const int64_t queries = problem.query.count, keys = problem.key.count;
  const Plan plan = keep ? keep.plan : plan_of(problem);
  std::vector<State<T>> lane_parts, row_parts;
  for (int64_t p = 0; p < plan.query.copies; p++) lane_parts.push_back(make_state<T>(queries));
  for (int64_t p = 0; columns && p < plan.key.copies; p++) row_parts.push_back(make_state<T>(keys));

  for_each_task(plan, [&](const Plan::Task& task, Scratch& scratch) {
    const Kernels<T>& k = kernels<T>();
    const State<T>& lane = lane_parts[task.query_copy];
    const State<T>* row = problem.symmetric ? &lane : columns ? &row_parts[task.key_copy] : nullptr;
    TileWalk<T>(problem, plan, task, scratch, keep, false)
        .run(&lane, row, [&](Tile<T> tile, Tile<T> positive, int64_t begin, int64_t key_begin) {
          const bool both = columns || (problem.symmetric && begin != key_begin);
          if (both)
            k.both_log_sum(tile, lane.negative(begin), row->negative(key_begin));
          else
            k.lane_log_sum(tile, lane.negative(begin));
          if (!positive.s) return;
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
PairSums<T> weighted_sums(const Problem<T>& problem, const Weigh<T>& weigh, Wanted wanted,
                          const KeptTiles<T>& kept) {
  const int64_t queries = problem.query.count, keys = problem.key.count;
  const int64_t width = round_up(problem.query.width, kernels<T>().vector);
  const bool symmetric = problem.symmetric;
  const Plan plan = kept ? kept.plan : plan_of(problem);
  PairSums<T> sums;
  if (wanted.query) sums.query = make_partials<T>(plan.query.copies, queries, width);
  if (wanted.key) sums.key = make_partials<T>(plan.key.copies, keys, width);
  if (wanted.bias) sums.bias = make_partials<T>(plan.key.copies, keys, 1);
  // whole vectors are added to its last lanes
  if (wanted.query_bias)
    sums.query_bias = make_partials<T>(plan.query.copies, round_up(queries, kLaneUnit), 1);
  if (plan.tasks.empty()) {
    clear(sums.query, 0, 0, queries);
    clear(sums.key, 0, 0, keys);
    clear(sums.bias, 0, 0, keys);
    clear(sums.query_bias, 0, 0, queries);
  }

  const bool by_tiles = wanted.scale && problem.bfloat16.parts;
  std::vector<double> weighted(by_tiles ? plan.tasks.size() : 0);

  for_each_task(plan, [&](const Plan::Task& task, Scratch& scratch) {
    const Kernels<T>& k = kernels<T>();
    if (task.query_turn == 0) {
      const int64_t begin = plan.query.begin(task.query_group), end = plan.query.end(task.query_group);
      clear(sums.query, task.query_copy, begin, end);
      clear(sums.query_bias, task.query_copy, begin, end == queries ? round_up(end, kLaneUnit) : end);
    }
    if (task.key_turn == 0) {
      clear(sums.key, task.key_copy, plan.key.begin(task.key_group), plan.key.end(task.key_group));
      clear(sums.bias, task.key_copy, plan.key.begin(task.key_group), plan.key.end(task.key_group));
    }
    const Partials<T>& row_out = symmetric ? sums.query : sums.key;
    TileWalk<T> walk(problem, plan, task, scratch, kept, static_cast<bool>(kept));
    walk.run(nullptr, nullptr, [&](Tile<T> tile, Tile<T> positive, int64_t begin, int64_t key_begin) {
      Tile<T> logits = tile;
      if (by_tiles) {
        logits.s = scratch.take<T>(kLogitSlot, plan.query.block * tile.stride);
        k.join_logits(logits, tile, problem.second_scale ? nullptr : positive.s);
      }
      weigh(task, tile, positive, begin, key_begin);
      if (by_tiles) {
        const bool twice = symmetric && begin == key_begin;  // such a tile holds each pair with both roles
        weighted[&task - plan.tasks.data()] +=
            k.weighted_sum(tile, logits, problem.bias2 ? problem.bias2 + key_begin : nullptr) /
            (twice ? 2 : 1);
      }
      if (sums.query_bias) k.add_lane_sums(tile, sums.query_bias.row(task.query_copy, begin));
      if (sums.query) walk.products().add_to_lanes(tile, sums.query.row(task.query_copy, begin));
      if (symmetric ? begin != key_begin : static_cast<bool>(sums.key))
        walk.products().add_to_rows(tile, row_out.row(task.key_copy, key_begin));
      if (sums.bias)
        for (int64_t r = 0; r < tile.rows; r++)
          *sums.bias.row(task.key_copy, key_begin + r) += k.sum(tile.row(r), tile.lanes);
    });
  });
  if (by_tiles) sums.scale = std::accumulate(weighted.begin(), weighted.end(), 0.0) / problem.scale2;
  return sums;
}

template <class T>
PairSums<T> pair_sums(const Problem<T>& problem, const SideWeights<T>& rows, const SideWeights<T>& columns,
                      Wanted wanted, const KeptTiles<T>& kept) {
  const SideWeights<T>& row_weights = problem.symmetric ? rows : columns;
  auto weigh = [&](const Plan::Task&, Tile<T> tile, Tile<T> positive, int64_t begin, int64_t key_begin) {
    const Kernels<T>& k = kernels<T>();
    auto softmax = [&](Tile<T> logits, auto weight) {
      if (row_weights)
        k.both_weights(logits, (rows.*weight)(begin), (row_weights.*weight)(key_begin));
      else
        k.lane_weights(logits, (rows.*weight)(begin));
    };
    if (problem.second_scale) {
      softmax(tile, &SideWeights<T>::negative);
      softmax(positive, &SideWeights<T>::positive);
      for (int64_t r = 0; r < tile.rows; r++)
        k.add_scaled(tile.row(r), positive.row(r), problem.second_scale, tile.lanes);
    } else if (positive.s) {
      const auto lane_pair = rows.pair(begin);
      const auto row_pair = row_weights ? row_weights.pair(key_begin) : lane_pair;
      k.pair_weights(tile, positive, &lane_pair, row_weights ? &row_pair : nullptr);
    } else {
      softmax(tile, &SideWeights<T>::negative);
    }
  };
  return weighted_sums<T>(problem, weigh, wanted, kept);
}

#define FASTCL_INSTANTIATE(T)                                                                                \
  template KeptTiles<T> make_kept_tiles<T>(const Problem<T>&);                                               \
  template Statistics<T> statistics<T>(const Problem<T>&, bool, const KeptTiles<T>&);                        \
  template SideWeights<T> make_side_weights<T>(int64_t);                                                     \
  template PairSums<T> weighted_sums<T>(const Problem<T>&, const Weigh<T>&, Wanted, const KeptTiles<T>&);    \
  template PairSums<T> pair_sums<T>(const Problem<T>&, const SideWeights<T>&, const SideWeights<T>&, Wanted, \
                                    const KeptTiles<T>&);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)

}  // namespace fastcl::cpu
