// The tiles of a task, one after the other.
#pragma once

#include <algorithm>
#include <memory>

#include "cpu/losses/stats.h"
#include "cpu/run/pair_rule.h"
#include "cpu/run/products.h"

namespace fastcl::cpu {

template <class T>
Plan plan_of(const Problem<T>& problem) {
  return make_plan(problem.query.count, problem.key.count, problem.symmetric);
}

// Walks the tiles of a task and makes their logits, with the pair rule applied, or finds them made.
template <class T>
class TileWalk {
 public:
  TileWalk(const Problem<T>& problem, const Plan& plan, const Plan::Task& task, Scratch& scratch,
           const KeptTiles<T>& kept, bool made)
      : problem_(problem), plan_(plan), task_(task), scratch_(scratch), kept_(kept), made_(made) {
    const int64_t block = plan.query.block;
    spare_ = scratch.take<T>(kTileSlot, block * block);
    tile_.stride = block;
    if (has_positives(problem)) positives_ = scratch.take<T>(kPositiveSlot, block * block);
    products_ = make_products(problem, block, block, scratch);
  }

  // body(tile, positive, query_begin, key_begin) for each tile, without memory of `positive` where it holds
  // none; `lane` and `row` receive the positives' sums and counts where given.
  template <class Body>
  void run(const State<T>* lane, const State<T>* row, const Body& body) {
    const Groups &query = plan_.query, &key = plan_.key;
    for (int64_t i = query.first_block(task_.query_group); i < query.first_block(task_.query_group + 1);
         i++) {
      const int64_t begin = i * query.block;
      tile_.lanes = std::min(query.block, query.count - begin);
      products_->set_lanes(begin, tile_.lanes);
      const int64_t first = task_.on_diagonal ? i : key.first_block(task_.key_group);
      for (int64_t j = first; j < key.first_block(task_.key_group + 1); j++) {
        const int64_t key_begin = j * key.block;
        tile_.rows = std::min(key.block, key.count - key_begin);
        products_->set_rows(key_begin, tile_.rows);
        make_logits(kept_.tile(i, j), begin, key_begin, lane, plan_.symmetric && i == j ? nullptr : row);
        body(tile_, positive_, begin, key_begin);
      }
    }
  }
  // Of the present tile.
  Products<T>& products() { return *products_; }

 private:
  // What is kept are the logits of all pairs that are not excluded; positives are separated in other memory.
  void make_logits(T* kept, int64_t begin, int64_t key_begin, const State<T>* lane, const State<T>* row) {
    const Problem<T>& p = problem_;
    tile_.s = kept ? kept : spare_;
    if (!kept || !made_) {
      products_->logits(tile_);
      exclude_pairs(p, tile_, begin, key_begin, scratch_);
    }
    if (!has_positives(p)) return;
    positive_ = tile_;
    positive_.s = positives_;
    if (p.second_scale) return kernels<T>().rescale(positive_, tile_, p.second_scale);
    Tile<T> negative = tile_;
    negative.s = spare_;
    if (split_pairs(p, tile_, {negative, positive_}, begin, key_begin,
                    lane ? lane->positive_sums(begin) : PositiveSums<T>{},
                    row ? row->positive_sums(key_begin) : PositiveSums<T>{}, scratch_))
      tile_ = negative;
    else
      positive_.s = nullptr;
  }

  const Problem<T>& problem_;
  const Plan& plan_;
  const Plan::Task task_;
  Scratch& scratch_;
  const KeptTiles<T>& kept_;
  const bool made_;
  std::unique_ptr<Products<T>> products_;
  Tile<T> tile_, positive_ = {};
  T *spare_, *positives_ = nullptr;
};

}  // namespace fastcl::cpu
