#include "cpu/losses/logistic.h"

#include "cpu/losses/tile_walk.h"

namespace fastcl::cpu {

namespace {

// Of each query, in log2 units; one of its negatives and one of its positives, or one of both.
template <class T>
struct RunningSums {
  Buffer<T> memory;
  int64_t stride;

  RunningSums(int64_t count, int sides) : stride(round_up(count, kLaneUnit)) {
    memory = allocate_filled<T>(2 * sides * stride, T(0));
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
  for (int64_t p = 0; p < plan.query.copies; p++) parts.emplace_back(queries, 2);
  const KeptTiles<T> none;
  for_each_task(plan, [&](const Plan::Task& task, Scratch& scratch) {
    const RunningSums<T>& part = parts[task.query_copy];
    TileWalk<T>(problem, plan, task, scratch, none, false)
        .run(nullptr, nullptr, [&](Tile<T> tile, Tile<T> positive, int64_t begin, int64_t) {
          kernels<T>().logistic_sums(tile, positive.s, bias2 + begin, part.of(0, begin), part.of(1, begin));
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
  auto weigh = [&](const Plan::Task&, Tile<T> tile, Tile<T> positive, int64_t begin, int64_t) {
    kernels<T>().logistic_weights(tile, positive.s, bias2 + begin, of_negatives.get() + begin,
                                  of_positives.get() + begin, {});
  };
  return weighted_sums<T>(problem, weigh, wanted);
}

template <class T>
PairSums<T> logistic_total(const Problem<T>& problem, const T* bias2, T incoming, Wanted wanted, T* total) {
  const int64_t queries = problem.query.count, stride = round_up(queries, kLaneUnit);
  const Buffer<T> of_negatives = allocate_filled<T>(stride, incoming),
                  of_positives = allocate_filled<T>(stride, -incoming);
  std::vector<RunningSums<T>> parts;
  for (int64_t p = 0; p < plan_of(problem).query.copies; p++) parts.emplace_back(queries, 1);
  auto weigh = [&](const Plan::Task& task, Tile<T> tile, Tile<T> positive, int64_t begin, int64_t) {
    kernels<T>().logistic_weights(tile, positive.s, bias2 + begin, of_negatives.get() + begin,
                                  of_positives.get() + begin, parts[task.query_copy].of(0, begin));
  };
  PairSums<T> sums = weighted_sums<T>(problem, weigh, wanted);
  double sum = 0;
  for (const RunningSums<T>& part : parts)
    for (int64_t i = 0; i < queries; i++) sum += part.of(0, i).total();
  *total = static_cast<T>(sum * incoming * kLn2);
  return sums;
}

#define FASTCL_INSTANTIATE(T)                                                                \
  template Buffer<T> padded<T>(const T*, int64_t, T);                                        \
  template void logistic_sums<T>(const Problem<T>&, const T*, T*);                           \
  template PairSums<T> logistic_pair_sums<T>(const Problem<T>&, const T*, const T*, Wanted); \
  template PairSums<T> logistic_total<T>(const Problem<T>&, const T*, T, Wanted, T*);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)

}  // namespace fastcl::cpu
