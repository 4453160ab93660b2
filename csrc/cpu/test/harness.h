// What the programs that test without torch share.
#pragma once

#include <cstdint>

namespace fastcl::cpu {

extern int64_t threads_of_the_test;  // in place of torch's

// Says what is wrong where the error is above its bound, or is NaN.
void check(const char* what, double error, double bound);
// What all that follows is a check of.
void set_subject(const char* name);
int64_t checks_made();
int64_t checks_failed();

}  // namespace fastcl::cpu
