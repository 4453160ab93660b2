#include "cpu/losses/soft_targets.h"

#include <numeric>
#include <type_traits>

#include "cpu/run/products.h"

namespace fastcl::cpu {

namespace {

// One of the two softmaxes. Keys are not copied: unit rows of them are formed tile by tile.
template <class T>
struct Softmax {
  UnitRows<T> query, key;
  BFloat16Sides bfloat16;
  Problem<T> problem;

  Softmax(const SoftmaxCall& call, bool normalize, Precision precision)
      : query(unit_rows<T>({call.query}, normalize)), key(inverse_norms<T>(call.key, normalize)) {
    problem.query = query.as_rows();
    problem.key = key_rows<T>(call.key, key.inverse.get());
    problem.scale2 = static_cast<T>(call.scale * kLog2E);
    if constexpr (std::is_same_v<T, float>) {
      if (call.scale == 0) return;
      bfloat16 = bfloat16_sides({call.query}, query, &call.key, &key, precision);
      problem.bfloat16 = bfloat16.problem;
    }
  }
};

// Arrays over all queries, whole vectors long.
template <class T>
class Arrays {
 public:
  Arrays(int64_t arrays, int64_t count, T value = 0)
      : stride_(round_up(count, kLaneUnit)), memory_(allocate_filled<T>(arrays * stride_, value)) {}
  T* at(int64_t array, int64_t i) const { return memory_.get() + array * stride_ + i; }

 private:
  int64_t stride_;
  Buffer<T> memory_;
};

// What is known of the softmaxes and their distances once some keys were seen.
template <class T>
struct Running {
  int64_t views, teachers;
  Arrays<T> max, sum, rest;           // of the views and then the teachers
  Arrays<T> distance, distance_rest;  // sum_j exp2(target logit - its max) (max - logit), by view and teacher

  Running(int64_t views, int64_t teachers, int64_t count)
      : views(views),
        teachers(teachers),
        max(views + teachers, count, excluded_logit<T>),
        sum(views + teachers, count),
        rest(views + teachers, count),
        distance(views * teachers, count),
        distance_rest(views * teachers, count) {}

  LogSum<T> of(int64_t softmax, int64_t i) const {
    return {max.at(softmax, i), {sum.at(softmax, i), rest.at(softmax, i)}};
  }
  Sum<T> distances(int64_t view, int64_t teacher, int64_t i) const {
    const int64_t array = view * teachers + teacher;
    return {distance.at(array, i), distance_rest.at(array, i)};
  }
};

template <class T>
class SoftTargets {
 public:
  // The teachers' rows are not looked at where their logits are kept.
  SoftTargets(const SoftTargetCall& call, bool with_teachers)
      : call_(call),
        views_(call.views, call.normalize, call.precision),
        teachers_(call.teachers, call.normalize && with_teachers, call.precision),
        plan_(make_plan(call.count, call.views.key.count, false)) {
    teachers_.problem.bias2 = static_cast<const T*>(call.target_bias2);
    const bool more = !call.rule.exclude.empty() || call.rule.within.row || call.rule.excluded_per_query;
    views_.problem.rule = teachers_.problem.rule = more ? &call.rule : nullptr;
  }

  void forward(T* losses, T* state, T* kept) const {
    std::vector<Running<T>> parts;
    for (int64_t p = 0; p < plan_.query.copies; p++)
      parts.emplace_back(view_count_, teacher_count_, call_.count);
    for_each_task(plan_, [&](const Plan::Task& task, Scratch& scratch) {
      see(parts[task.query_copy], task, scratch, kept);
    });
    for_each_range(call_.count, 256, [&](int64_t begin, int64_t end, Scratch&) {
      for (int64_t i = begin; i < end; i++) write(parts, i, losses, state);
    });
  }

  void backward(const T* grad, const T* state, const T* kept, const SoftTargetGradients<T>& result) const;

 private:
  // A tile of the grid.
  struct Place {
    int64_t begin, lanes, first, rows;  // of the queries and the keys

    int64_t stride() const { return round_up(lanes, kLaneUnit); }
  };
  // The tiles of a task, in turn; and what their logits are made with.
  class Walk {
   public:
    Walk(const SoftTargets& targets, const Plan::Task& task, Scratch& scratch, int64_t tiles, T* kept,
         bool made)
        : targets_(targets), task_(task), scratch_(scratch), kept_(kept), made_(made) {
      const int64_t block = targets.plan_.query.block;
      views = make_products(targets.views_.problem, block, block, scratch);
      teachers_ = make_products(targets.teachers_.problem, block, block, second_);
      memory_ = scratch.take<T>(kTileSlot, tiles * block * block);
    }

    template <class Body>
    void run(const Body& body) {
      const Groups &query = targets_.plan_.query, &key = targets_.plan_.key;
      for (int64_t i = query.first_block(task_.query_group); i < query.first_block(task_.query_group + 1);
           i++) {
        place_.begin = i * query.block;
        place_.lanes = std::min(query.block, query.count - place_.begin);
        for (int64_t j = key.first_block(task_.key_group); j < key.first_block(task_.key_group + 1); j++) {
          place_.first = j * key.block;
          place_.rows = std::min(key.block, key.count - place_.first);
          views->set_rows(place_.first, place_.rows);
          if (!kept_ || !made_) teachers_->set_rows(place_.first, place_.rows);
          body(place_);
        }
      }
    }
    T* tile(int64_t index) const {
      return memory_ + index * targets_.plan_.query.block * targets_.plan_.key.block;
    }
    // Logits of a view's rows, or a teacher's, with the pair rule applied: in `memory`, unless they are kept.
    Tile<T> view(int64_t v, T* memory) { return logits(*views, targets_.views_.problem, v, v, memory); }
    Tile<T> teacher(int64_t t, T* memory) {
      return logits(*teachers_, targets_.teachers_.problem, t, targets_.view_count_ + t, memory);
    }

    std::unique_ptr<Products<T>> views;

   private:
    Tile<T> logits(Products<T>& products, const Problem<T>& problem, int64_t index, int64_t softmax,
                   T* memory) {
      const int64_t count = targets_.call_.count, keys = problem.key.count;
      if (kept_) {
        const int64_t before = softmax * round_up(count, kLaneUnit) + place_.begin;
        memory = kept_ + before * keys + place_.first * place_.stride();
      }
      const Tile<T> tile{memory, place_.stride(), place_.rows, place_.lanes};
      products.set_lanes(index * count + place_.begin, place_.lanes);
      if (kept_ && made_) return tile;
      products.logits(tile);
      exclude_pairs(problem, tile, place_.begin, place_.first, scratch_);
      if (kept_)  // an output, so all of it is written
        for (int64_t r = 0; r < tile.rows; r++)
          std::fill(tile.row(r) + tile.lanes, tile.row(r) + tile.stride, excluded_logit<T>);
      return tile;
    }

    const SoftTargets& targets_;
    const Plan::Task task_;
    Scratch &scratch_, second_;  // of the teachers' products
    T* const kept_;
    const bool made_;
    std::unique_ptr<Products<T>> teachers_;
    T* memory_;
    Place place_;
  };

  void see(const Running<T>& running, const Plan::Task& task, Scratch& scratch, T* kept) const {
    const Kernels<T>& k = kernels<T>();
    Walk walk(*this, task, scratch, teacher_count_ + 1, kept, false);
    const int64_t block = plan_.query.block;
    Arrays<T> before(view_count_ + teacher_count_, block), decay(teacher_count_, block), shift(1, block);
    walk.run([&](const Place& place) {
      const int64_t begin = place.begin, lanes = place.lanes;
      T* const spare = walk.tile(teacher_count_);
      for (int64_t t = 0; t < teacher_count_; t++) {
        const LogSum<T> lane = running.of(view_count_ + t, begin);
        for (int64_t i = 0; i < lanes; i++) *before.at(view_count_ + t, i) = (lane.sum + i).total();
        k.soften(walk.teacher(t, walk.tile(t)), lane, decay.at(t, 0), walk.tile(t));
      }
      for (int64_t v = 0; v < view_count_; v++) {
        const LogSum<T> lane = running.of(v, begin);
        std::copy_n(lane.max, lanes, before.at(v, 0));
        const Tile<T> tile = walk.view(v, spare);
        k.lane_log_sum(tile, lane);
        for (int64_t t = 0; t < teacher_count_; t++) {
          for (int64_t i = 0; i < lanes; i++) {
            const T max = *before.at(v, i), sum = *before.at(view_count_ + t, i);
            *shift.at(0, i) = is_empty(max) ? T(0) : (lane.max[i] - max) * sum * *decay.at(t, i);
          }
          k.add_distances(tile, walk.tile(t), lane.max, shift.at(0, 0), decay.at(t, 0),
                          running.distances(v, t, begin));
        }
      }
    });
  }

  // Merges the parts' softmaxes and distances of query i.
  void write(const std::vector<Running<T>>& parts, int64_t i, T* losses, T* state) const {
    const int64_t softmaxes = view_count_ + teacher_count_, count = call_.count;
    std::vector<T> max(softmaxes, excluded_logit<T>), sum(softmaxes, T(0));
    for (int64_t s = 0; s < softmaxes; s++) {
      for (const Running<T>& part : parts) max[s] = std::max(max[s], *part.of(s, i).max);
      for (const Running<T>& part : parts) {
        const LogSum<T> own = part.of(s, i);
        sum[s] += is_empty(*own.max) ? own.total() * 0 : own.total() * std::exp2(*own.max - max[s]);
      }
      const bool empty = is_empty(max[s]) && !std::isnan(sum[s]);
      state[2 * s * count + i] = empty ? -INFINITY : max[s];
      state[(2 * s + 1) * count + i] = empty ? T(0) : sum[s];
    }
    for (int64_t v = 0; v < view_count_; v++) {
      T mean = 0;
      for (int64_t t = 0; t < teacher_count_; t++) {
        const int64_t s = view_count_ + t;
        T total = 0;
        for (const Running<T>& part : parts) {
          const LogSum<T> target = part.of(s, i), view = part.of(v, i);
          const T above = is_empty(*view.max) ? T(0) : (max[v] - *view.max) * target.total();
          const T own = part.distances(v, t, i).total() + above;
          total += is_empty(*target.max) ? own * 0 : own * std::exp2(*target.max - max[s]);
        }
        mean += total / sum[s] / static_cast<T>(teacher_count_);
      }
      const bool empty = is_empty(max[v]) && !std::isnan(sum[v]);
      losses[v * count + i] = empty ? T(0) : (mean + std::log2(sum[v])) * static_cast<T>(kLn2);
    }
  }

  void add_gradients(const Plan::Task& task, Scratch& scratch, const Arrays<T>& weights, const T* kept,
                     const Partials<T>& query, const Partials<T>& key, double* scale) const;
  void write_key(const Partials<T>& sums, T* out) const;

  const SoftTargetCall& call_;
  Softmax<T> views_, teachers_;
  const Plan plan_;
  const int64_t view_count_ = call_.view_count(), teacher_count_ = call_.teacher_count();
};

// `weights`: of each softmax its maxima and its factors, then the views' gradients.
template <class T>
void SoftTargets<T>::add_gradients(const Plan::Task& task, Scratch& scratch, const Arrays<T>& weights,
                                   const T* kept, const Partials<T>& query, const Partials<T>& key,
                                   double* scale) const {
  const Kernels<T>& k = kernels<T>();
  // which are only read, being made already
  Walk walk(*this, task, scratch, 3, const_cast<T*>(kept), true);
  T *const spare = walk.tile(0), *const difference = walk.tile(1), *const target = walk.tile(2);
  const int64_t gradients = 2 * (view_count_ + teacher_count_);
  auto weight = [&](int64_t softmax, int64_t i) {
    return Weight<T>{weights.at(2 * softmax, i), weights.at(2 * softmax + 1, i)};
  };
  walk.run([&](const Place& place) {
    for (int64_t t = 0; t < teacher_count_; t++)
      k.add_softmax(walk.teacher(t, spare), weight(view_count_ + t, place.begin), target, t == 0);
    for (int64_t v = 0; v < view_count_; v++) {
      const Tile<T> logits = walk.view(v, spare);
      Tile<T> tile = logits;
      tile.s = difference;
      k.softmax_less_target(logits, weight(v, place.begin), target, weights.at(gradients + v, place.begin),
                            tile.s);
      if (scale) *scale += k.weighted_sum(tile, logits, nullptr);
      if (query) walk.views->add_to_lanes(tile, query.row(task.query_copy, v * call_.count + place.begin));
      if (key) walk.views->add_to_rows(tile, key.row(task.key_copy, place.first));
    }
  });
}

template <class T>
void SoftTargets<T>::backward(const T* grad, const T* state, const T* kept,
                              const SoftTargetGradients<T>& result) const {
  const int64_t count = call_.count, keys = call_.views.key.count, width = views_.query.stride;
  const int64_t softmaxes = view_count_ + teacher_count_;
  Arrays<T> weights(2 * softmaxes + view_count_, count);
  for (int64_t s = 0; s < softmaxes; s++) {
    const T share = s < view_count_ ? T(1) : T(1) / static_cast<T>(teacher_count_);
    for (int64_t i = 0; i < count; i++) {
      const T max = state[2 * s * count + i], sum = state[(2 * s + 1) * count + i];
      *weights.at(2 * s, i) = std::isinf(max) ? T(0) : max;
      *weights.at(2 * s + 1, i) = sum == 0 ? T(0) : share / sum;
    }
  }
  for (int64_t v = 0; v < view_count_; v++)
    std::copy_n(grad + v * count, count, weights.at(2 * softmaxes + v, 0));

  Partials<T> query, key;
  if (result.query || result.scale) query = make_partials<T>(plan_.query.copies, view_count_ * count, width);
  if (result.key && plan_.key.copies == 1 && width == views_.key.width)
    key = {{}, 1, keys, width, result.key};
  else if (result.key)
    key = make_partials<T>(plan_.key.copies, keys, width);
  const bool by_tiles = result.scale && views_.problem.bfloat16.parts;
  std::vector<double> scales(by_tiles ? plan_.tasks.size() : 0);
  auto clear = [](const Partials<T>& partials, int64_t part, int64_t begin, int64_t end) {
    if (partials) std::fill(partials.row(part, begin), partials.row(part, end), T(0));
  };
  if (plan_.tasks.empty()) {
    clear(query, 0, 0, view_count_ * count);
    clear(key, 0, 0, keys);
  }
  for_each_task(plan_, [&](const Plan::Task& task, Scratch& scratch) {
    for (int64_t v = 0; task.query_turn == 0 && v < view_count_; v++)
      clear(query, task.query_copy, v * count + plan_.query.begin(task.query_group),
            v * count + plan_.query.end(task.query_group));
    if (task.key_turn == 0)
      clear(key, task.key_copy, plan_.key.begin(task.key_group), plan_.key.end(task.key_group));
    add_gradients(task, scratch, weights, kept, query, key,
                  by_tiles ? &scales[&task - plan_.tasks.data()] : nullptr);
  });
  if (by_tiles) {
    *result.scale = std::accumulate(scales.begin(), scales.end(), 0.0) / views_.problem.scale2;
  } else if (result.scale) {
    *result.scale = 0;
    for (int64_t i = 0; i < query.rows; i++)
      for (int64_t p = 0; p < query.parts; p++)
        *result.scale += kernels<T>().dot(views_.query.row(i), query.row(p, i), width);
  }
  const T scale = static_cast<T>(call_.views.scale);
  if (result.query)
    write_gradients(
        views_.query, scale, [&](int64_t i, T* row) { add_parts(query, i, row); },
        rows_of(result.query, views_.query.width), static_cast<T*>(nullptr));
  if (result.key) write_key(key, result.key);
}

template <class T>
void SoftTargets<T>::write_key(const Partials<T>& sums, T* out) const {
  const T scale = static_cast<T>(call_.views.scale);
  for_each_sum(sums, [&](int64_t begin, int64_t count, const T* range, Scratch& scratch) {
    write_key_gradients(views_.problem.key, views_.key.inverse.get(), scale, begin, count, range, sums.width,
                        out, scratch);
  });
}

}  // namespace

int64_t logits_to_keep(const SoftTargetCall& call) {
  return (call.view_count() + call.teacher_count()) * round_up(call.count, kLaneUnit) * call.views.key.count;
}

template <class T>
void soft_cross_entropy(const SoftTargetCall& call, T* losses, T* state, T* kept) {
  SoftTargets<T>(call, true).forward(losses, state, kept);
}
template <class T>
void soft_cross_entropy_backward(const SoftTargetCall& call, const T* grad, const T* state, const T* kept,
                                 const SoftTargetGradients<T>& result) {
  SoftTargets<T>(call, !kept).backward(grad, state, kept, result);
}

#define FASTCL_INSTANTIATE(T)                                                                       \
  template void soft_cross_entropy<T>(const SoftTargetCall&, T*, T*, T*);                           \
  template void soft_cross_entropy_backward<T>(const SoftTargetCall&, const T*, const T*, const T*, \
                                               const SoftTargetGradients<T>&);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)

}  // namespace fastcl::cpu
