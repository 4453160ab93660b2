#include "cpu/losses/attend.h"

#include "cpu/run/pair_rule.h"
#include "cpu/run/plan.h"
#include "cpu/run/products.h"

namespace fastcl::cpu {

namespace {

constexpr int64_t kKeyRows = 192;                   // keys per tile
constexpr int64_t kKeptBytes = int64_t{32} << 20;   // of weights
constexpr int64_t kSummedTiles = 3;                 // of keys, by a task of the second sweep
constexpr int64_t kMinChunk = 64;                   // queries whose weights are kept at a time
constexpr int64_t kManyStrips = 16;                 // keep as many threads busy
constexpr int64_t kMinStrip = 64, kMaxStrip = 128;  // queries
constexpr int64_t kStripBytes = int64_t{8} << 20;   // of a strip's weights
constexpr int kSlack = 4;  // by which a maximum may pass what weights are relative to (log2 units)

int64_t block_of(int64_t queries) { return even_block(queries, kMaxBlock); }

// The weights of a chunk of queries, kept from the first sweep over the keys for the second, and the maxima
// to which they are relative: those of the keys before them in their part.
template <class T>
struct KeptWeights {
  int64_t block, blocks;
  Buffer<T> weights, maxima;

  KeptWeights(int64_t queries, int64_t keys) : block(block_of(queries)), blocks(ceil_div(queries, block)) {
    weights = allocate<T>(ceil_div(keys, kKeyRows) * blocks * kKeyRows * block);
    maxima = allocate<T>(ceil_div(keys, kKeyRows) * blocks * block);
  }
  T* tile(int64_t key_begin, int64_t b) const { return weights.get() + index(key_begin, b) * kKeyRows; }
  T* max(int64_t key_begin, int64_t b) const { return maxima.get() + index(key_begin, b); }

 private:
  int64_t index(int64_t key_begin, int64_t b) const { return (key_begin / kKeyRows * blocks + b) * block; }
};

template <class T>
class Attention {
 public:
  Attention(const Problem<T>& problem, Selector<T>* selector = nullptr)
      : problem_(problem),
        selector_(selector),
        width_(round_up(problem.query.width, kernels<T>().vector)),
        result_{make_state<T>(problem.query.count), make_partials<T>(1, problem.query.count, width_)} {}

  // The first sweep, for `count` queries from `first` on; their weights go to `kept`, unless it is null.
  void attend(int64_t first, int64_t count, const KeptWeights<T>* kept) {
    const int64_t block = block_of(count), blocks = ceil_div(count, block);
    const int64_t tiles = ceil_div(problem_.key.count, kKeyRows);
    const int64_t parts = parts_of_keys(count, problem_.key.count);
    if (parts == 1) {
      return for_each_task(blocks, [&](int64_t b, Scratch& scratch) {
        const int64_t begin = first + b * block;
        attend_block({begin, std::min(block, first + count - begin), block, b, 0}, 0, tiles, kept,
                     result_.rows.negative(begin), result_.query.row(0, begin), scratch);
      });
    }
    std::vector<State<T>> states;
    for (int64_t p = 0; p < parts; p++) states.push_back(make_state<T>(count));
    const Partials<T> sums = make_partials<T>(parts, count, width_);
    for_each_task(blocks * parts, [&](int64_t task, Scratch& scratch) {
      const int64_t b = task % blocks, part = task / blocks, begin = b * block;
      attend_block({first + begin, std::min(block, count - begin), block, b, part}, tiles * part / parts,
                   tiles * (part + 1) / parts, kept, states[part].negative(begin), sums.row(part, begin),
                   scratch);
    });
    for_each_range(count, 64, [&](int64_t begin, int64_t end, Scratch&) {
      for (int64_t i = begin; i < end; i++) merge(states, sums, i, first + i);
    });
  }

  // The second sweep: for each tile of keys, sum += those weights of the chunk's queries times `factors`
  // times the queries, for sum = sums(first key).
  template <class Sums, class Emit>
  void sum_keys(int64_t first, int64_t count, const KeptWeights<T>& kept, const T* factors, const Sums& sums,
                const Emit& emit) {
    for_each_range(
        problem_.key.count, kSummedTiles * kKeyRows, [&](int64_t range, int64_t end, Scratch& scratch) {
          Scaled scaled(*this, kept.block, scratch);
          for (int64_t key_begin = range; key_begin < end; key_begin += kKeyRows) {
            const int64_t rows = std::min(kKeyRows, end - key_begin);
            T* const sum = sums(key_begin, rows, scratch);
            for (int64_t b = 0; b < kept.blocks; b++) {
              const int64_t begin = first + b * kept.block;
              const Block block{begin, std::min(kept.block, first + count - begin), kept.block, b, 0};
              scaled.add(block, kept, {key_begin, rows}, factors, sum);
            }
            emit(key_begin, rows, sum, scratch);
          }
        });
  }

  // Both sweeps of a block of queries one after the other, by one thread, its weights in a strip that stays
  // in the cache. The strips take turns in adding to the sums of a tile of keys.
  void attend_in_strips(int64_t lanes, const RowFactor<T>& factor, T* factors, const Partials<T>& sums) {
    const int64_t queries = problem_.query.count, keys = problem_.key.count;
    const int64_t tiles = ceil_div(keys, kKeyRows);
    Turns turns(tiles);
    for_each_task(ceil_div(queries, lanes), turns.guarded([&](int64_t b, Scratch& scratch) {
      const int64_t begin = b * lanes;
      const Block block{begin, std::min(lanes, queries - begin), lanes, 0, 0};
      const KeptWeights<T> kept(lanes, keys);
      attend_block(block, 0, tiles, &kept, result_.rows.negative(begin), result_.query.row(0, begin),
                   scratch);
      set_factors(begin, block.lanes, factor, factors);
      Scaled scaled(*this, lanes, scratch);
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t key_begin = t * kKeyRows, rows = std::min(kKeyRows, keys - key_begin);
        turns.take(t, b, [&] {
          T* const sum = sums.row(0, key_begin);
          if (b == 0) std::fill_n(sum, rows * width_, T(0));
          scaled.add(block, kept, {key_begin, rows}, factors, sum);
        });
      }
    }));
  }

  // What multiplies the weights of `count` queries from `first` on, once their sums are known.
  void set_factors(int64_t first, int64_t count, const RowFactor<T>& factor, T* factors) const {
    for (int64_t i = first; i < first + count; i++) {
      const LogSum<T> entry = result_.rows.negative(i);
      factors[i] = factor(i, *entry.max, entry.total());
    }
  }

  Attended<T>& result() { return result_; }
  int64_t width() const { return width_; }

 private:
  struct Block {
    int64_t begin, lanes, stride, index, part;
  };

  // What was summed relative to `before`, relative to `now`.
  static T factor_between(T before, T now) {
    if (before == now) return 1;
    return is_empty(before) ? T(0) : std::exp2(before - now);
  }

  struct Keys {
    int64_t begin, rows;
  };

  // A block's queries, times what makes kept weights of a tile of keys those of the gradient. Neighbouring
  // tiles mostly agree in it.
  class Scaled {
   public:
    Scaled(const Attention& attention, int64_t stride, Scratch& scratch)
        : attention_(attention),
          products_(make_products(attention.problem_, kKeyRows, stride, scratch)),
          factor_(scratch.take<T>(kQuerySlot, stride)) {}

    // sum += the kept weights of a block of queries and a tile of keys times `factors` times the queries
    void add(Block block, const KeptWeights<T>& kept, Keys keys, const T* factors, T* sum) {
      const T* const max = attention_.result_.rows.negative(block.begin).max;
      const T* const reference = kept.max(keys.begin, block.index);
      if (!reference_ || !std::equal(reference, reference + block.lanes, reference_)) {
        for (int64_t i = 0; i < block.lanes; i++)
          factor_[i] = factors[block.begin + i] * factor_between(reference[i], max[i]);
        products_->set_lanes(block.begin, block.lanes);
        products_->scale_lanes(factor_);
      }
      reference_ = kept.blocks == 1 ? reference : nullptr;
      products_->add_to_rows({kept.tile(keys.begin, block.index), block.stride, keys.rows, block.lanes}, sum);
    }

   private:
    const Attention& attention_;
    const std::unique_ptr<Products<T>> products_;
    T* const factor_;
    const T* reference_ = nullptr;  // of the tile before, if of the same block
  };

  void attend_block(Block block, int64_t first_tile, int64_t last_tile, const KeptWeights<T>* kept,
                    LogSum<T> state, T* out, Scratch& scratch) const {
    const Kernels<T>& k = kernels<T>();
    const auto products = make_products(problem_, kKeyRows, block.stride, scratch);
    T* const reference = scratch.take<T>(kQuerySlot, block.stride);
    auto refer = [&](int64_t i, T to) {
      const T factor = factor_between(reference[i], to);
      reference[i] = to;
      state.sum.sum[i] *= factor;
      for (int64_t d = 0; d < width_; d++) out[i * width_ + d] *= factor;
    };
    std::fill_n(reference, block.stride, excluded_logit<T>);
    Tile<T> tile{kept ? nullptr : scratch.take<T>(kTileSlot, kKeyRows * block.stride), block.stride, 0,
                 block.lanes};
    std::fill_n(out, block.lanes * width_, T(0));
    products->set_lanes(block.begin, block.lanes);
    for (int64_t key_begin = first_tile * kKeyRows;
         key_begin < std::min(last_tile * kKeyRows, problem_.key.count); key_begin += kKeyRows) {
      if (kept) tile.s = kept->tile(key_begin, block.index);
      tile.rows = std::min(kKeyRows, problem_.key.count - key_begin);
      products->set_rows(key_begin, tile.rows);
      products->logits(tile);
      exclude_pairs(problem_, tile, block.begin, key_begin, scratch);
      if (selector_) selector_->offer(tile, block.begin, block.part, key_begin, scratch);
      k.lane_max(tile, state.max);
      for (int64_t i = 0; i < block.lanes; i++)
        if (state.max[i] - reference[i] > kSlack) refer(i, state.max[i]);
      k.exponentiate(tile, reference, state.sum.sum);
      if (kept) std::copy_n(reference, block.lanes, kept->max(key_begin, block.index));
      products->add_to_lanes(tile, out);
    }
    for (int64_t i = 0; i < block.lanes; i++)
      if (state.max[i] != reference[i]) refer(i, state.max[i]);
  }

  // Row i of all parts, into the result's.
  void merge(const std::vector<State<T>>& states, const Partials<T>& sums, int64_t i, int64_t row) {
    const LogSum<T> all = result_.rows.negative(row);
    for (const State<T>& part : states) merge_log_sum(all, part.negative(i));
    T* const out = result_.query.row(0, row);
    std::fill_n(out, width_, T(0));
    for (int64_t p = 0; p < sums.parts; p++) {
      const T max = *states[p].negative(i).max;
      if (is_empty(max) && !std::isnan(states[p].negative(i).total())) continue;
      kernels<T>().add_scaled(out, sums.row(p, i), std::exp2(max - *all.max), width_);
    }
  }

  const Problem<T>& problem_;
  Selector<T>* const selector_;
  const int64_t width_;
  Attended<T> result_;
};

}  // namespace

template <class T>
Attended<T> attend(const Problem<T>& problem, Selector<T>* selector) {
  Attention<T> attention(problem, selector);
  attention.attend(0, problem.query.count, nullptr);
  return std::move(attention.result());
}

// Queries whose weights are kept at a time.
template <class T>
int64_t chunk_of(const Problem<T>& problem) {
  const int64_t keys = std::max<int64_t>(problem.key.count, 1);
  const int64_t fitting = kKeptBytes / (keys * static_cast<int64_t>(sizeof(T)));
  return std::min(problem.query.count, fitting / kMinChunk * kMinChunk);
}

template <class T>
bool weights_fit(const Problem<T>& problem) {
  return chunk_of(problem) > 0;
}

// Queries of a strip; 0 where strips would keep fewer threads busy than parts of the keys do, or are too
// large.
template <class T>
int64_t strip_of(const Problem<T>& problem) {
  const int64_t queries = problem.query.count, keys = problem.key.count;
  const int64_t lanes = even_block(queries, std::clamp(queries / kManyStrips, kMinStrip, kMaxStrip));
  const int64_t parts = ceil_div(queries, block_of(queries)) * parts_of_keys(queries, keys);
  const bool busy = ceil_div(queries, lanes) >= std::min(parts, kManyStrips);
  return busy && lanes * keys * static_cast<int64_t>(sizeof(T)) <= kStripBytes ? lanes : 0;
}

template <class T>
Attended<T> attend_with_keys(const Problem<T>& problem, const RowFactor<T>& factor, const KeySums<T>& emit) {
  const int64_t queries = problem.query.count, keys = problem.key.count;
  const int64_t strip = strip_of(problem), chunk = chunk_of(problem);
  Attention<T> attention(problem);
  const Buffer<T> factors = allocate<T>(queries);
  const int64_t width = attention.width();
  Partials<T> all;  // of the keys, unless they are summed in one go
  if (strip || chunk < queries) all = make_partials<T>(1, keys, width);
  if (strip) {
    attention.attend_in_strips(strip, factor, factors.get(), all);
    for_each_range(keys, kKeyRows, [&](int64_t begin, int64_t end, Scratch& scratch) {
      emit(begin, end - begin, all.row(0, begin), scratch);
    });
    return std::move(attention.result());
  }
  for (int64_t first = 0; first < queries; first += chunk) {
    const int64_t count = std::min(chunk, queries - first);
    const KeptWeights<T> kept(count, keys);
    attention.attend(first, count, &kept);
    for_each_range(count, kMinChunk, [&](int64_t begin, int64_t end, Scratch&) {
      attention.set_factors(first + begin, end - begin, factor, factors.get());
    });
    auto sums = [&](int64_t key_begin, int64_t rows, Scratch& scratch) {
      T* const sum = all ? all.row(0, key_begin) : scratch.take<T>(kSumSlot, kKeyRows * width);
      if (first == 0) std::fill_n(sum, rows * width, T(0));
      return sum;
    };
    auto emit_last = [&](int64_t key_begin, int64_t rows, T* sum, Scratch& scratch) {
      if (first + count == queries) emit(key_begin, rows, sum, scratch);
    };
    attention.sum_keys(first, count, kept, factors.get(), sums, emit_last);
  }
  return std::move(attention.result());
}

#define FASTCL_INSTANTIATE(T)                                      \
  template Attended<T> attend<T>(const Problem<T>&, Selector<T>*); \
  template bool weights_fit<T>(const Problem<T>&);                 \
  template Attended<T> attend_with_keys<T>(const Problem<T>&, const RowFactor<T>&, const KeySums<T>&);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)

}  // namespace fastcl::cpu
