#include "cpu/run/memory.h"

#include <sys/mman.h>

#include <bit>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace fastcl::cpu {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPooled = size_t{96} << 20;  // all that the pool may hold

struct Header {
  size_t bytes;
};
static_assert(sizeof(Header) <= kAlignment);

struct Pool {
  std::mutex mutex;
  std::vector<Header*> blocks;
  size_t bytes = 0;
};
Pool& pool() {
  static Pool* pool = new Pool;  // never destroyed: threads may outlive static objects
  return *pool;
}

// Few distinct sizes, little too large, so that a freed block often fits again.
size_t size_class(size_t bytes) {
  const size_t step = bytes >= kHugePage ? kHugePage : std::max<size_t>(4096, std::bit_floor(bytes) / 16);
  return (bytes + step - 1) / step * step;
}

}  // namespace

void* take_memory(size_t bytes) {
  bytes = size_class(bytes + kAlignment);
  {
    const std::lock_guard lock(pool().mutex);
    auto& blocks = pool().blocks;
    for (size_t i = 0; i < blocks.size(); i++) {
      if (blocks[i]->bytes != bytes) continue;
      Header* block = blocks[i];
      blocks.erase(blocks.begin() + static_cast<ptrdiff_t>(i));
      pool().bytes -= bytes;
      return reinterpret_cast<char*>(block) + kAlignment;
    }
  }
  const bool large = bytes >= kHugePage;
  void* block = std::aligned_alloc(large ? kHugePage : kAlignment, bytes);
  if (!block) throw std::bad_alloc();
  if (large) madvise(block, bytes, MADV_HUGEPAGE);  // a hint: far fewer page faults where it is followed
  static_cast<Header*>(block)->bytes = bytes;
  return static_cast<char*>(block) + kAlignment;
}

void give_back_memory(void* memory) {
  if (!memory) return;
  Header* block = reinterpret_cast<Header*>(static_cast<char*>(memory) - kAlignment);
  if (block->bytes > kPooled) return std::free(block);
  const std::lock_guard lock(pool().mutex);
  auto& blocks = pool().blocks;
  blocks.push_back(block);
  pool().bytes += block->bytes;
  // the oldest go: what an earlier, larger problem left must not keep this one from the pool
  size_t dropped = 0;
  for (; pool().bytes > kPooled; dropped++) {
    pool().bytes -= blocks[dropped]->bytes;
    std::free(blocks[dropped]);
  }
  blocks.erase(blocks.begin(), blocks.begin() + static_cast<ptrdiff_t>(dropped));
}

}  // namespace fastcl::cpu
