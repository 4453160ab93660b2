// From a loss op's tensors to the arguments of its kernel, for the device and for the host's run of it.
#pragma once

#include "cuda/one_launch.h"
#include "tensors.h"

namespace fastcl {

struct LossInputs {
  Tensor query, positive;
  OptionalTensor negatives, query_ids, negative_ids;
  Layout layout;
  bool normalize, normalize_negatives, mean;
};

template <class T>
bool is_packed(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kPackBytes == 0 &&
         x.stride(0) % Pack<T>::kCount == 0 && x.size(1) % Pack<T>::kCount == 0;
}

// launch(args) with a OneLaunch of the inputs' type.
template <class T, class Launch>
void run_one_launch(const LossInputs& in, const LossOutputs& out, const Device& device, const float* scale,
                    float* scale_gradient, const Launch& launch) {
  auto input = [](const Tensor& x, bool normalize) {
    return Input<T>{static_cast<const T*>(x.const_data_ptr()), x.stride(0), normalize};
  };
  const std::optional<Plan> plan = make_plan(
      in.layout, in.query.size(0), in.negatives ? in.negatives->size(0) : 0, in.query.size(1), device);
  STD_TORCH_CHECK(plan, "one_launch: a similarity matrix of ", in.query.size(0),
                  " samples does not fit into ", device.blocks, " blocks of ", device.shared_bytes,
                  " bytes of shared memory");
  OneLaunch<T> args{
      {input(in.query, in.normalize), input(in.positive, in.normalize), {}},
      ids_of(in.query_ids),
      ids_of(in.negative_ids),
      scale,
      in.layout,
      in.mean,
      is_packed<T>(in.query) && is_packed<T>(in.positive) && (!in.negatives || is_packed<T>(*in.negatives)),
      out_of<float>(out.loss),
      {out_of<float>(out.query), out_of<float>(out.positive), out_of<float>(out.negatives)},
      scale_gradient,
      *plan,
      Work(*plan, out.any_gradient()),
      nullptr};
  if (in.negatives) args.inputs[2] = input(*in.negatives, in.normalize_negatives);
  const Tensor memory = torch::stable::new_empty(in.query, {args.work.total}, ScalarType::Float);
  args.memory = out_of<float>(memory);
  launch(args);
}

template <class Launch>
void run_one_launch(const LossInputs& given, const LossOutputs& out, const Device& device, const float* scale,
                    float* scale_gradient, const Launch& launch) {
  LossInputs in = given;
  in.query = row_contiguous(in.query);
  in.positive = row_contiguous(in.positive);
  if (in.negatives) {
    STD_TORCH_CHECK(in.negatives->scalar_type() == in.query.scalar_type(),
                    "one_launch: negatives must have the query's dtype");
    in.negatives = row_contiguous(*in.negatives);
  }
  with_type(in.query, [&](auto zero) {
    run_one_launch<decltype(zero)>(in, out, device, scale, scale_gradient, launch);
  });
}

}  // namespace fastcl
