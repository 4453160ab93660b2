// The host's body of the tile vocabulary: see tile.cuh. A warp is a thread, which holds whole fragments.
#pragma once

#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define FASTCL_TILE inline
#define FASTCL_BODY on_host
#define FASTCL_UNROLL

namespace fastcl::cuda {
inline namespace FASTCL_BODY {

inline uint32_t float_bits(float x) { return c10::bit_cast<uint32_t>(x); }
inline float float_of_bits(uint32_t x) { return c10::bit_cast<float>(x); }

class Block {
 public:
  Block(int index, int count, int warp, char* shared, std::barrier<>& block, std::barrier<>& grid)
      : index_(index), count_(count), warp_(warp), shared_(shared), block_(block), grid_(grid) {}

  int index() const { return index_; }
  int warp() const { return warp_; }
  bool leader() const { return true; }
  int grid_warp() const { return index_ * kWarps + warp_; }
  int grid_warps() const { return count_ * kWarps; }

  char* shared() const { return shared_; }
  void barrier() const { block_.arrive_and_wait(); }
  void grid_barrier() const { grid_.arrive_and_wait(); }

  template <int Unroll = 4, class Body>
  void each(int count, const Body& body) const {
    for (int first = warp_ * kLanes; first < count; first += kWarps * kLanes)
      for (int i = first; i < std::min(count, first + kLanes); i++) body(i);
  }
  template <class Body>
  void warp_each(int count, const Body& body) const {
    for (int i = 0; i < count; i++) body(i);
  }
  // Lane by lane, then by halves, as on the device.
  template <class Value>
  float warp_sum(int count, const Value& value) const {
    float sums[kLanes] = {};
    for (int i = 0; i < count; i++) sums[i % kLanes] += value(i);
    for (int step = kLanes / 2; step > 0; step /= 2)
      for (int i = 0; i < step; i++) sums[i] += sums[i + step];
    return sums[0];
  }
  template <class Value>
  float warp_max(int count, float floor, const Value& value) const {
    float max = floor;
    for (int i = 0; i < count; i++) max = std::fmax(max, value(i));
    return max;
  }

 private:
  int index_, count_, warp_;
  char* shared_;
  std::barrier<>&block_, &grid_;
};

// What a tensor core multiplies: a half as it is, a float32 as the sum of two TF32 numbers.
template <class T>
struct Operand {
  float value;
  Operand() = default;
  Operand(float x) : value(static_cast<float>(static_cast<T>(x))) {}
  static float add_product(float sum, Operand a, Operand b) { return sum + a.value * b.value; }
};
template <>
struct Operand<float> {
  float high, low;
  Operand() = default;
  Operand(float x) : high(rounded(x)), low(rounded(x - high)) {}
  static float add_product(float sum, Operand a, Operand b) {
    sum += a.low * b.high;
    sum += a.high * b.low;
    return sum + a.high * b.high;
  }

 private:
  // to 10 bits after the point, ties away from zero
  static float rounded(float x) {
    return std::isfinite(x) ? float_of_bits((float_bits(x) + 0x1000u) & ~0x1fffu) : x;
  }
};

template <class T>
struct FragmentA {
  Operand<T> at[kFragment][kFragment];  // row, depth

  template <class Value>
  void fill(const Value& value) {
    for (int row = 0; row < kFragment; row++)
      for (int depth = 0; depth < kFragment; depth++) at[row][depth] = value(row, depth);
  }
  void load(const T* from, int pitch) {
    fill([=](int row, int depth) { return static_cast<float>(from[row * pitch + depth]); });
  }
};

template <class T>
struct FragmentB {
  Operand<T> at[kFragment][kFragment];  // depth, column

  void load(const T* from, int pitch) {
    fill([=](int depth, int column) { return static_cast<float>(from[depth * pitch + column]); });
  }
  void load_transposed(const T* from, int pitch) {
    fill([=](int depth, int column) { return static_cast<float>(from[column * pitch + depth]); });
  }

 private:
  template <class Value>
  void fill(const Value& value) {
    for (int depth = 0; depth < kFragment; depth++)
      for (int column = 0; column < kFragment; column++) at[depth][column] = value(depth, column);
  }
};

template <int Columns>
class Accumulator {
 public:
  template <class T>
  void add_product(int column, const FragmentA<T>& a, const FragmentB<T>& b) {
    for (int row = 0; row < kFragment; row++)
      for (int depth = 0; depth < kFragment; depth++)
        for (int i = 0; i < kFragment; i++) {
          float& sum = sum_[row][column + i];
          sum = Operand<T>::add_product(sum, a.at[row][depth], b.at[depth][i]);
        }
  }
  template <class Body>
  void each(const Body& body) const {
    for (int row = 0; row < kFragment; row++)
      for (int column = 0; column < Columns; column++) body(row, column, sum_[row][column]);
  }

 private:
  float sum_[kFragment][Columns] = {};
};

// Runs kernel(block) on every warp of a grid whose blocks all live at once.
template <class Kernel>
void run_grid(int blocks, int64_t shared_bytes, const Kernel& kernel) {
  struct Shared {
    std::barrier<> barrier{kWarps};
    std::unique_ptr<char[]> memory;
  };
  std::vector<Shared> shared(blocks);
  std::barrier<> grid(int64_t(blocks) * kWarps);
  std::vector<std::jthread> warps;
  for (Shared& block : shared) {
    block.memory = std::make_unique<char[]>(shared_bytes);
    std::memset(block.memory.get(), 0xff, shared_bytes);  // NaN, so that reading what nobody wrote shows
  }
  for (int index = 0; index < blocks; index++)
    for (int warp = 0; warp < kWarps; warp++)
      warps.emplace_back([&, index, warp] {
        kernel(Block(index, blocks, warp, shared[index].memory.get(), shared[index].barrier, grid));
      });
}

}  // namespace FASTCL_BODY
}  // namespace fastcl::cuda
