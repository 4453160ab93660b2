// Aligned buffers. Freed ones of moderate size wait in a small pool for the next call: fresh pages from
// the system cost a small batch more than its arithmetic.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace fastcl::cpu {

constexpr size_t kAlignment = 64;

void* take_memory(size_t bytes);  // throws std::bad_alloc
void give_back_memory(void* memory);

struct FreeMemory {
  void operator()(void* memory) const { give_back_memory(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], FreeMemory>;

// Uninitialized; with room for a whole vector past the end.
template <class T>
Buffer<T> allocate(int64_t count) {
  return Buffer<T>(static_cast<T*>(take_memory(count * sizeof(T) + kAlignment)));
}
template <class T>
Buffer<T> allocate_filled(int64_t count, T value) {
  Buffer<T> buffer = allocate<T>(count);
  std::fill_n(buffer.get(), count, value);
  return buffer;
}

}  // namespace fastcl::cpu
