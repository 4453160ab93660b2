// The queue's step: what its kernel is given.
#pragma once

#include <cstdint>

namespace fastcl::cuda {

template <class T, class Key>
struct Enqueue {
  const T* rows;  // (count, width), `stride` apart
  int64_t stride;
  const int64_t* row_ids;  // (count), null for a queue without ids
  Key* keys;               // (size, width)
  int64_t* ids;            // (size)
  int64_t* pointer;        // where the next row goes
  int64_t size;
  int count, width;
};

}  // namespace fastcl::cuda
