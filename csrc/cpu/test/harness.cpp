#include "cpu/test/harness.h"

#include <cstdio>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/run/parallel.h"

namespace fastcl::cpu {

int64_t threads_of_the_test = 1;

int64_t thread_count() { return threads_of_the_test; }

void on_threads(int64_t threads, const std::function<void()>& work) {
  std::exception_ptr error;
  std::mutex mutex;
  auto guarded = [&] {
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; i++) others.emplace_back(guarded);
  guarded();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

namespace {
const char* subject = "";
int64_t made = 0, failed = 0;
}  // namespace

void check(const char* what, double error, double bound) {
  made++;
  if (error <= bound) return;
  failed++;
  std::printf("%s: %s: error %g, bound %g\n", subject, what, error, bound);
}
void set_subject(const char* name) { subject = name; }
int64_t checks_made() { return made; }
int64_t checks_failed() { return failed; }

}  // namespace fastcl::cpu
