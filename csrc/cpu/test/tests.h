// The tests of an instruction set: each of the first is defined by vec_test.cpp, compiled once per
// instruction set; the others test the one in use.
#pragma once

namespace fastcl::cpu {

void check_vectors_generic();
void check_vectors_avx2();
void check_vectors_avx512();
void check_vectors_neon();

void check_rows();
void check_products();
void check_sums();
void check_one_positive();

}  // namespace fastcl::cpu
