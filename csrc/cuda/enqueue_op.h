// From the enqueue op's tensors to the arguments of its kernel.
#pragma once

#include "cuda/enqueue.h"
#include "cuda/grid.h"
#include "tensors.h"

namespace fastcl::cuda {

// As many blocks as have a row per warp, up to what lives at once.
inline int enqueue_blocks(int64_t count, const Device& device) {
  const int64_t blocks = (count + kWarps - 1) / kWarps;
  return static_cast<int>(blocks < 1 ? 1 : blocks > device.blocks ? device.blocks : blocks);
}

// launch(args) with an Enqueue of the tensors' types. The queue's tensors and all ids are contiguous.
template <class Launch>
void run_enqueue(const Tensor& keys, const OptionalTensor& ids, const Tensor& pointer, const Tensor& new_keys,
                 const OptionalTensor& new_ids, const Launch& launch) {
  const Tensor rows = row_contiguous(new_keys);
  with_type(rows, [&](auto row_zero) {
    with_type(keys, [&](auto key_zero) {
      using T = decltype(row_zero);
      using Key = decltype(key_zero);
      launch(Enqueue<T, Key>{static_cast<const T*>(rows.const_data_ptr()), rows.stride(0), ids_of(new_ids),
                             out_of<Key>(keys), ids ? out_of<int64_t>(*ids) : nullptr,
                             out_of<int64_t>(pointer), keys.size(0), static_cast<int>(rows.size(0)),
                             static_cast<int>(rows.size(1))});
    });
  });
}

}  // namespace fastcl::cuda
