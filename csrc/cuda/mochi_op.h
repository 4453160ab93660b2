// From the mixing op's tensors to the arguments of its kernel.
#pragma once

#include "cuda/mochi.h"
#include "tensors.h"

namespace fastcl::cuda {

// In the order of the op's schema. Only query and positive may have rows that are not contiguous.
struct MixingArguments {
  Tensor query, positive, scale, keys, hard, queue_max, queue_sum, queue_mean, first, second, alpha, partner,
      beta;
};

struct MixingOutputs {
  Tensor loss, query, positive, scale;

  explicit MixingOutputs(const Tensor& x)
      : loss(torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float)),
        query(output_like(x, x, ScalarType::Float, true)),
        positive(output_like(x, x, ScalarType::Float, true)),
        scale(torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const { return {loss, query, positive, scale}; }
};

// launch(args, blocks, shared_bytes) with a Mixing of the tensors' types: a block per row, up to what lives
// at once.
template <class Launch>
void run_mixing(const MixingArguments& in, const MixingOutputs& out, const Device& device,
                const Launch& launch) {
  const Tensor query = row_contiguous(in.query), positive = row_contiguous(in.positive);
  auto floats = [](const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); };
  auto ranks = [](const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); };
  auto count = [](const Tensor& x, int dim) { return static_cast<int>(x.size(dim)); };
  STD_TORCH_CHECK(in.scale.scalar_type() == ScalarType::Float, "mix_negatives: scale must be float32");
  with_type(query, [&](auto row_zero) {
    with_type(in.keys, [&](auto key_zero) {
      using T = decltype(row_zero);
      using Key = decltype(key_zero);
      const Mixing<T, Key> args{static_cast<const T*>(query.const_data_ptr()),
                                static_cast<const T*>(positive.const_data_ptr()),
                                query.stride(0),
                                positive.stride(0),
                                static_cast<const Key*>(in.keys.const_data_ptr()),
                                floats(in.scale),
                                ranks(in.hard),
                                floats(in.queue_max),
                                floats(in.queue_sum),
                                floats(in.queue_mean),
                                ranks(in.first),
                                ranks(in.second),
                                ranks(in.partner),
                                floats(in.alpha),
                                floats(in.beta),
                                out_of<float>(out.loss),
                                out_of<float>(out.query),
                                out_of<float>(out.positive),
                                out_of<float>(out.scale),
                                count(query, 0),
                                count(query, 1),
                                count(in.hard, 1),
                                count(in.first, 1),
                                count(in.partner, 1)};
      const int64_t bytes = args.floats().bytes();
      STD_TORCH_CHECK(bytes <= device.shared_bytes, "mix_negatives: ", args.n_hard, " hard keys and ",
                      args.synthetics(), " synthetic negatives of ", args.width, " components need ", bytes,
                      " bytes of shared memory, there are ", device.shared_bytes);
      launch(args, args.rows < 1 ? 1 : args.rows > device.blocks ? device.blocks : args.rows, bytes);
    });
  });
}

}  // namespace fastcl::cuda
