// The CPU's kernels against double precision, on every instruction set of the machine: a program without
// torch, which also runs under an emulator.
#include <cstdio>
#include <initializer_list>

#include "cpu/simd/isa.h"
#include "cpu/test/harness.h"
#include "cpu/test/tests.h"

namespace fastcl::cpu {
namespace {

struct Level {
  const char* name;
  void (*check_vectors)();
};
#if defined(__aarch64__)
constexpr Level kLevels[] = {{"generic", check_vectors_generic}, {"neon", check_vectors_neon}};
#else
constexpr Level kLevels[] = {{"generic", check_vectors_generic},
                             {"avx2", check_vectors_avx2},
                             {"avx512", check_vectors_avx512},
                             {"avx512_bf16", check_vectors_avx512},
                             {"amx", check_vectors_avx512}};
#endif

void check_level(int level) {
  force_isa(static_cast<Isa>(level));
  const int64_t made = checks_made(), failed = checks_failed();
  set_subject(kLevels[level].name);
  kLevels[level].check_vectors();
  check_rows();
  check_products();
  check_sums();
  for (const int64_t threads : {1, 3}) {
    threads_of_the_test = threads;
    check_one_positive();
  }
  std::printf("%s: %ld checks, %ld failed\n", kLevels[level].name, long(checks_made() - made),
              long(checks_failed() - failed));
}

}  // namespace
}  // namespace fastcl::cpu

int main() {
  for (int level = 0; level <= static_cast<int>(fastcl::cpu::best_isa()); level++)
    fastcl::cpu::check_level(level);
  const bool ok = fastcl::cpu::checks_failed() == 0;
  std::printf("kernels: %s\n", ok ? "ok" : "FAILED");
  return !ok;
}
