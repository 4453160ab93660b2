// The functions of vec.h, compiled once per instruction set as kernels.cpp is, and as there no standard
// library.
#include "cpu/simd/vec.h"

#include "cpu/test/harness.h"
#include "cpu/test/tests.h"

namespace fastcl::cpu {
namespace {

// Distance in units of the last place of a normal number.
template <class T>
double ulps(T got, long double exact) {
  constexpr int kDigits = sizeof(T) == 4 ? 24 : 53;
  const long double error = got - exact;
  return static_cast<double>(__builtin_ldexpl(error < 0 ? -error : error,
                                              kDigits - 1 - __builtin_ilogb(static_cast<double>(exact))));
}

template <class T>
void check_exp2() {
  constexpr T kLowest = sizeof(T) == 4 ? -126 : -1022, kHighest = sizeof(T) == 4 ? 120 : 1000;
  constexpr int64_t kPoints = 10000;
  double worst = 0;
  for (int64_t i = 0; i <= kPoints; i++) {
    const T x = kLowest + (kHighest - kLowest) * T(i) / kPoints;
    const double error = ulps<T>(exp2(splat(x))[i % kLanes<T>], __builtin_exp2l(x));
    worst = error > worst ? error : worst;
  }
  check("exp2, in ulp", worst, 1.2);
  const T small[] = {kLowest * T(1.001), T(-1e30), T(-__builtin_inf())};
  for (const T x : small) check("exp2 below the smallest normal number", exp2(splat(x))[0], 0);
  const T nan = exp2(splat(T(__builtin_nan(""))))[0];
  check("exp2 of NaN is NaN", nan != nan ? 0 : 1, 0);
}

template <class T>
void check_lane(int64_t lane) {
  const T nan = __builtin_nan("");
  Vec<T> x;
  for (int64_t i = 0; i < kLanes<T>; i++) x[i] = T(i == lane ? 100 : -3 - i);
  const int64_t others = kLanes<T> - 1;
  const int64_t sum = 100 - 3 * others - (kLanes<T> * others / 2 - lane);
  check("horizontal_sum", __builtin_fabs(double(horizontal_sum<T>(x) - T(sum))), 0);
  check("horizontal_max", __builtin_fabs(double(horizontal_max<T>(x) - 100)), 0);

  const Vec<T> one = splat(T(1));
  Vec<T> y = one;
  auto expect = [&](const char* what, Vec<T> a, Vec<T> b, bool above) {
    check(what, not_at_most(a, b) == (above ? 1u << lane : 0u) ? 0 : 1, 0);
  };
  expect("not_at_most of what is equal", y, one, false);
  y[lane] = T(1.5);
  expect("not_at_most of what is larger", y, one, true);
  expect("not_at_most of what is smaller", one, y, false);
  check("maximum", double(maximum(one, y)[lane] - T(1.5)), 0);
  check("minimum", double(minimum(y, one)[lane] - 1), 0);
  y[lane] = nan;
  expect("not_at_most of NaN", y, one, true);
  expect("not_at_most than NaN", one, y, true);
  // which a row's maximum never starts from
  if (lane > 0) check("horizontal_max beside NaN", double(horizontal_max<T>(y) - 1), 0);
  check("maximum with NaN", double(maximum(one, y)[lane] - 1), 0);
}

template <class T>
void check_transpose() {
  constexpr int64_t kSide = kLanes<T>;
  Vec<T> square[kSide];
  for (int64_t i = 0; i < kSide; i++)
    for (int64_t j = 0; j < kSide; j++) square[i][j] = T(kSide * i + j);
  transpose<T>(square);
  int64_t wrong = 0;
  for (int64_t i = 0; i < kSide; i++)
    for (int64_t j = 0; j < kSide; j++) wrong += square[i][j] != T(kSide * j + i);
  check("transpose", double(wrong), 0);
}

template <class T>
void check_vectors() {
  check_exp2<T>();
  check_transpose<T>();
  for (int64_t lane = 0; lane < kLanes<T>; lane++) check_lane<T>(lane);
}

}  // namespace

#define FASTCL_NAME_(isa) check_vectors_##isa
#define FASTCL_NAME(isa) FASTCL_NAME_(isa)
void FASTCL_NAME(FASTCL_ISA)() {
  check_vectors<float>();
  check_vectors<double>();
}

}  // namespace fastcl::cpu
