// Rows normalized and written over the queue's oldest keys, in one launch of a grid that stays.
#pragma once

#include "cuda/enqueue.h"
#include "cuda/unit_rows.cuh"

namespace fastcl::cuda {
inline namespace FASTCL_BODY {

template <class T, class Key>
FASTCL_TILE void enqueue_rows(const Block& block, const Enqueue<T, Key>& args) {
  const int64_t start = *args.pointer;
  // earlier rows would be overwritten at once
  const int first = args.count > args.size ? static_cast<int>(args.count - args.size) : 0;
  for (int row = first + block.grid_warp(); row < args.count; row += block.grid_warps()) {
    const T* x = args.rows + row * args.stride;
    const int64_t slot = (start + row) % args.size;
    const float inverse = inverse_norm(norm(block, x, args.width));
    block.warp_each(args.width, [&](int d) {
      args.keys[slot * args.width + d] = static_cast<Key>(static_cast<float>(x[d]) * inverse);
    });
    if (args.row_ids && block.leader()) args.ids[slot] = args.row_ids[row];
  }
  block.grid_barrier();  // every block has read the pointer
  if (block.index() == 0 && block.warp() == 0 && block.leader())
    *args.pointer = (start + args.count) % args.size;
}

}  // namespace FASTCL_BODY
}  // namespace fastcl::cuda
