#include "cpu/losses/logistic.h"

#include "cpu/losses/tile_walk.h"

namespace fastcl::cpu {

namespace {

// Of the negatives and the positives of each query, in log2 units.
template <class T>
struct RunningSums {
  Buffer<T> memory;
  int64_t stride;

  explicit RunningSums(int64_t count) : stride(round_up(count, kLaneUnit)) {
    memory = allocate_filled<T>(4 * stride, T(0));
  }
  Sum<T> of(int side, int64_t i) const {
    T* const sum = memory.get() + 2 * side * stride + i;
    return {sum, sum + stride};
  }
};

}  // namespace

template <class T>
Buffer<T> padded(const T* values, int64_t count, T factor) {
  Buffer<T> result = allocate_filled<T>(round_up(count, kLaneUnit), T(0));
  for (int64_t i = 0; i < count; i++) result[i] = values[i] * factor;
  return result;
}

template <class T>
void logistic_sums(const Problem<T>& problem, const T* bias2, T* sums) {
  const int64_t queries = problem.query.count;
  const Plan plan = plan_of(problem);
  std::vector<RunningSums<T>> parts;
  for (int64_t p = 0; p < plan.query.copies; p++) parts.emplace_back(queries);
  const KeptTiles<T> none;
  for_each_task(plan, [&](const Plan::Task& task, Scratch& scratch) {
    const RunningSums<T>& part = parts[task.query_copy];
    TileWalk<T>(problem, plan, task, scratch, none, false)
        .run(nullptr, nullptr, [&](Tile<T> tile, Tile<T> positive, int64_t begin, int64_t) {
          kernels<T>().logistic_sums(tile, has_positives(problem) ? positive.s : nullptr, bias2 + begin,
                                     part.of(0, begin), part.of(1, begin));
        });
  });
  for (int side = 0; side < 2; side++) {
    for (int64_t i = 0; i < queries; i++) {
      T total = 0;
      for (const RunningSums<T>& part : parts) total += part.of(side, i).total();
      sums[side * queries + i] = total * static_cast<T>(kLn2);
    }
  }
}

template <class T>
PairSums<T> logistic_pair_sums(const Problem<T>& problem, const T* bias2, const T* grad, Wanted wanted) {
  const int64_t queries = problem.query.count;
  const Buffer<T> of_negatives = padded(grad, queries, T(1)),
                  of_positives = padded(grad + queries, queries, T(-1));
  auto weigh = [&](Tile<T> tile, Tile<T> positive, int64_t begin, int64_t) {
    kernels<T>().logistic_weights(tile, has_positives(problem) ? positive.s : nullptr, bias2 + begin,
                                  of_negatives.get() + begin, of_positives.get() + begin);
  };
  return weighted_sums<T>(problem, weigh, wanted);
}

#define FASTCL_INSTANTIATE(T)                                      \
  template Buffer<T> padded<T>(const T*, int64_t, T);              \
  template void logistic_sums<T>(const Problem<T>&, const T*, T*); \
  template PairSums<T> logistic_pair_sums<T>(const Problem<T>&, const T*, const T*, Wanted);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)

}  // namespace fastcl::cpu
