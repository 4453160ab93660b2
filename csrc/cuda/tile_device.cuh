// The device's body of the tile vocabulary: see tile.cuh. For compute capability 8.0 and up.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FASTCL_TILE __device__ __forceinline__
#define FASTCL_BODY on_device
#define FASTCL_UNROLL _Pragma("unroll")

namespace fastcl::cuda {
inline namespace FASTCL_BODY {

using std::uint32_t;

FASTCL_TILE uint32_t float_bits(float x) { return __float_as_uint(x); }
FASTCL_TILE float float_of_bits(uint32_t x) { return __uint_as_float(x); }

class Block {
 public:
  FASTCL_TILE int index() const { return blockIdx.x; }
  FASTCL_TILE int warp() const { return threadIdx.x / kLanes; }
  FASTCL_TILE bool leader() const { return lane() == 0; }
  FASTCL_TILE int grid_warp() const { return blockIdx.x * kWarps + warp(); }
  FASTCL_TILE int grid_warps() const { return gridDim.x * kWarps; }

  FASTCL_TILE char* shared() const {
    extern __shared__ __align__(16) char memory[];
    return memory;
  }
  FASTCL_TILE void barrier() const { __syncthreads(); }
  FASTCL_TILE void grid_barrier() const { cooperative_groups::this_grid().sync(); }

  // Calls body(i) for every i below count, spread over the block's lanes.
  template <int Unroll = 4, class Body>
  FASTCL_TILE void each(int count, const Body& body) const {
#pragma unroll Unroll
    for (int i = threadIdx.x; i < count; i += kWarps * kLanes) body(i);
  }
  // The same over the lanes of one warp. The same i is always the same lane's.
  template <class Body>
  FASTCL_TILE void warp_each(int count, const Body& body) const {
#pragma unroll 4
    for (int i = lane(); i < count; i += kLanes) body(i);
  }
  template <class Value>
  FASTCL_TILE float warp_sum(int count, const Value& value) const {
    float sum = 0;
    warp_each(count, [&](int i) { sum += value(i); });
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  }
  // At least `floor`; NaN counts for nothing.
  template <class Value>
  FASTCL_TILE float warp_max(int count, float floor, const Value& value) const {
    float max = floor;
    warp_each(count, [&](int i) { max = fmaxf(max, value(i)); });
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, step));
    return max;
  }

 private:
  static FASTCL_TILE int lane() { return threadIdx.x % kLanes; }
};

// Where the tensor cores keep what: a lane's first row or column, and its first pair along the other axis.
FASTCL_TILE int lane_group() { return threadIdx.x % kLanes / 4; }
FASTCL_TILE int lane_in_group() { return threadIdx.x % 4; }

FASTCL_TILE uint32_t pack(c10::Half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
FASTCL_TILE uint32_t pack(c10::BFloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <bool Transpose>
FASTCL_TILE void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transpose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// Of a half type, in shared memory with rows `pitch` apart, 16 bytes aligned.
template <class T>
struct FragmentA {
  uint32_t part[4];

  // value(row, depth)
  template <class Value>
  FASTCL_TILE void fill(const Value& value) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = lane_group() + i % 2 * 8, depth = lane_in_group() * 2 + i / 2 * 8;
      part[i] = pack(T{}, value(row, depth), value(row, depth + 1));
    }
  }
  FASTCL_TILE void load(const T* from, int pitch) {
    const int lane = threadIdx.x % kLanes;
    load_matrices<false>(part, from + lane % 16 * pitch + lane / 16 * 8);
  }
};

template <class T>
struct FragmentB {
  uint32_t part[2][2];  // of columns 0 to 7 and 8 to 15; depths 0 to 7 and 8 to 15

  // `from` holds depths as rows.
  FASTCL_TILE void load(const T* from, int pitch) {
    const int lane = threadIdx.x % kLanes;
    load_matrices<true>(reinterpret_cast<uint32_t (&)[4]>(part), from + lane % 16 * pitch + lane / 16 * 8);
  }
  // `from` holds columns as rows.
  FASTCL_TILE void load_transposed(const T* from, int pitch) {
    const int lane = threadIdx.x % kLanes;
    load_matrices<false>(reinterpret_cast<uint32_t (&)[4]>(part),
                         from + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
  }
};

// A float32 as the sum of two TF32 numbers.
struct Split {
  uint32_t high, low;

  FASTCL_TILE void operator=(float x) {
    high = rounded(x);
    low = rounded(x - float_of_bits(high));
  }
  static FASTCL_TILE uint32_t rounded(float x) {
    uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
    return result;
  }
};

template <>
struct FragmentA<float> {
  Split part[2][4];  // of depths 0 to 7 and 8 to 15

  template <class Value>
  FASTCL_TILE void fill(const Value& value) {
#pragma unroll
    for (int i = 0; i < 8; i++)
      part[i / 4][i % 4] = value(lane_group() + i % 2 * 8, lane_in_group() + i / 2 * 4);
  }
  FASTCL_TILE void load(const float* from, int pitch) {
    fill([=](int row, int depth) { return from[row * pitch + depth]; });
  }
};

template <>
struct FragmentB<float> {
  Split part[2][2][2];  // of columns 0 to 7 and 8 to 15; depths 0 to 7 and 8 to 15

  FASTCL_TILE void load(const float* from, int pitch) {
    fill([=](int depth, int column) { return from[depth * pitch + column]; });
  }
  FASTCL_TILE void load_transposed(const float* from, int pitch) {
    fill([=](int depth, int column) { return from[column * pitch + depth]; });
  }

 private:
  template <class Value>
  FASTCL_TILE void fill(const Value& value) {
#pragma unroll
    for (int i = 0; i < 8; i++)
      part[i / 4][i / 2 % 2][i % 2] = value(lane_in_group() + i % 4 * 4, lane_group() + i / 4 * 8);
  }
};

// 16 x 8 sums += 16 x 16 times 16 x 8.
FASTCL_TILE void multiply_add(float (&sum)[4], const FragmentA<c10::BFloat16>& a, const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b[0]), "r"(b[1]));
}
FASTCL_TILE void multiply_add(float (&sum)[4], const FragmentA<c10::Half>& a, const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b[0]), "r"(b[1]));
}
template <uint32_t Split::* A, uint32_t Split::* B>
FASTCL_TILE void multiply_add_tf32(float (&sum)[4], const Split (&a)[4], const Split (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0].*A), "r"(a[1].*A), "r"(a[2].*A), "r"(a[3].*A), "r"(b[0].*B), "r"(b[1].*B));
}
FASTCL_TILE void multiply_add(float (&sum)[4], const FragmentA<float>& a, const Split (&b)[2][2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    multiply_add_tf32<&Split::low, &Split::high>(sum, a.part[half], b[half]);
    multiply_add_tf32<&Split::high, &Split::low>(sum, a.part[half], b[half]);
    multiply_add_tf32<&Split::high, &Split::high>(sum, a.part[half], b[half]);
  }
}

template <int Columns>
class Accumulator {
 public:
  // Adds a times b to the 16 columns from `column` on.
  template <class T>
  FASTCL_TILE void add_product(int column, const FragmentA<T>& a, const FragmentB<T>& b) {
    multiply_add(sum_[column / 8], a, b.part[0]);
    multiply_add(sum_[column / 8 + 1], a, b.part[1]);
  }
  // body(row, column, sum)
  template <class Body>
  FASTCL_TILE void each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < Columns / 2; i++)
      body(lane_group() + i / 2 % 2 * 8, i / 4 * 8 + lane_in_group() * 2 + i % 2, sum_[i / 4][i % 4]);
  }

 private:
  float sum_[Columns / 8][4] = {};
};

}  // namespace FASTCL_BODY
}  // namespace fastcl::cuda
