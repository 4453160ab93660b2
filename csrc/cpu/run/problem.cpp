#include "cpu/run/problem.h"

namespace fastcl::cpu {

template <class T>
State<T> make_state(int64_t count) {
  State<T> state;
  state.stride = round_up(count, kLaneUnit);
  state.memory = allocate_filled<T>(State<T>::kFields * state.stride, T(0));
  for (int f : {State<T>::kNegMax, State<T>::kPosMax})
    std::fill_n(state.field(f), state.stride, excluded_logit<T>);
  return state;
}

template <class T>
void merge_log_sum(LogSum<T> into, LogSum<T> other) {
  const T max = std::max(*into.max, *other.max), a = into.total(), b = other.total();
  *into.sum.sum = (is_empty(*into.max) ? a * 0 : a * std::exp2(*into.max - max)) +
                  (is_empty(*other.max) ? b * 0 : b * std::exp2(*other.max - max));
  *into.sum.rest = 0;
  *into.max = max;
}

template <class T>
void merge_state(const State<T>& into, const State<T>& other, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    merge_log_sum(into.negative(i), other.negative(i));
    merge_log_sum(into.positive(i), other.positive(i));
    const PositiveSums<T> sums = into.positive_sums(i), others = other.positive_sums(i);
    *sums.sum.sum = sums.sum.total() + others.sum.total();
    *sums.sum.rest = 0;
    *sums.count += *others.count;
  }
}

template void merge_log_sum<float>(LogSum<float>, LogSum<float>);
template void merge_log_sum<double>(LogSum<double>, LogSum<double>);
template State<float> make_state<float>(int64_t);
template State<double> make_state<double>(int64_t);
template void merge_state<float>(const State<float>&, const State<float>&, int64_t, int64_t);
template void merge_state<double>(const State<double>&, const State<double>&, int64_t, int64_t);

}  // namespace fastcl::cpu
