#include "cpu/losses/sinkhorn.h"

#include "cpu/losses/tile_walk.h"

namespace fastcl::cpu {

namespace {

template <class T>
class Potentials {
 public:
  explicit Potentials(const Problem<T>& problem)
      : problem_(problem),
        kept_(make_kept_tiles(problem)),
        plan_(kept_ ? kept_.plan : plan_of(problem)),
        of_rows_(zeros(problem.query.count)),
        of_keys_(zeros(problem.key.count)) {}

  // A side's from the other's.
  void update(bool keys) {
    const int64_t count = keys ? problem_.key.count : problem_.query.count;
    std::vector<State<T>> parts;
    for (int64_t p = 0; p < (keys ? plan_.key : plan_.query).copies; p++)
      parts.push_back(make_state<T>(count));
    for_each_task(plan_, [&](const Plan::Task& task, Scratch& scratch) {
      const Kernels<T>& k = kernels<T>();
      const State<T>& state = parts[keys ? task.key_copy : task.query_copy];
      const int64_t block = plan_.query.block;
      T* const shifted = scratch.take<T>(kLogitSlot, block * block);
      TileWalk<T>(problem_, plan_, task, scratch, kept_, made_)
          .run(nullptr, nullptr, [&](Tile<T> tile, Tile<T>, int64_t begin, int64_t key_begin) {
            Tile<T> with_potentials = tile;
            with_potentials.s = shifted;
            k.add_biases(with_potentials, tile, keys ? of_rows_.get() + begin : nullptr,
                         keys ? nullptr : of_keys_.get() + key_begin);
            if (keys)
              k.row_log_sum(with_potentials, state.negative(key_begin));
            else
              k.lane_log_sum(with_potentials, state.negative(begin));
          });
    });
    made_ = true;
    for_each_range(count, 4096, [&](int64_t begin, int64_t end, Scratch&) {
      for (size_t p = 1; p < parts.size(); p++) merge_state(parts[0], parts[p], begin, end);
      for (int64_t i = begin; i < end; i++) {
        const LogSum<T> sum = parts[0].negative(i);
        const bool empty = is_empty(*sum.max) && !std::isnan(sum.total());
        (keys ? of_keys_ : of_rows_)[i] = empty ? INFINITY : -(*sum.max + std::log2(sum.total()));
      }
    });
  }
  const T* of_keys() const { return of_keys_.get(); }

 private:
  // Whole vectors long.
  static Buffer<T> zeros(int64_t count) { return allocate_filled<T>(round_up(count, kLaneUnit), T(0)); }

  const Problem<T>& problem_;
  const KeptTiles<T> kept_;
  const Plan plan_;
  Buffer<T> of_rows_, of_keys_;  // in log2 units
  bool made_ = false;            // the kept logits
};

}  // namespace

template <class T>
void sinkhorn(const Problem<T>& problem, int64_t steps, T* of_keys) {
  Potentials<T> potentials(problem);
  for (int64_t step = 0; step < steps; step++) {
    if (step) potentials.update(false);
    potentials.update(true);
  }
  for (int64_t j = 0; j < problem.key.count; j++) of_keys[j] = potentials.of_keys()[j] * static_cast<T>(kLn2);
}

template void sinkhorn<float>(const Problem<float>&, int64_t, float*);
template void sinkhorn<double>(const Problem<double>&, int64_t, double*);

}  // namespace fastcl::cpu
