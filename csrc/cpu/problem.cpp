#include "cpu/problem.h"

namespace fastcl {

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
void merge_state(const State<T>& into, const State<T>& other, int64_t begin, int64_t end) {
  for (int first : {State<T>::kNegMax, State<T>::kPosMax}) {
    T *max = into.field(first), *sum = into.field(first + 1);
    const T *other_max = other.field(first), *other_sum = other.field(first + 1);
    for (int64_t i = begin; i < end; i++) {
      const T m = std::max(max[i], other_max[i]);
      const T a = is_empty(max[i]) ? sum[i] * 0 : sum[i] * std::exp2(max[i] - m);
      const T b = is_empty(other_max[i]) ? other_sum[i] * 0 : other_sum[i] * std::exp2(other_max[i] - m);
      max[i] = m;
      sum[i] = a + b;
    }
  }
  for (int field : {State<T>::kPosTotal, State<T>::kPosCount})
    for (int64_t i = begin; i < end; i++) into.field(field)[i] += other.field(field)[i];
}

template State<float> make_state<float>(int64_t);
template State<double> make_state<double>(int64_t);
template void merge_state<float>(const State<float>&, const State<float>&, int64_t, int64_t);
template void merge_state<double>(const State<double>&, const State<double>&, int64_t, int64_t);

}  // namespace fastcl
