// From the loss ops' tensors to the arguments of their kernels, for the device and for the host's run of it.
#pragma once

#include <array>

#include "cuda/one_launch.h"
#include "tensors.h"

namespace fastcl::cuda {

// Where a launch runs, and the scale's place there.
struct Target {
  const Device& device;
  const float* scale;
  float* scale_gradient;  // null where not wanted
};

// One input of a loss, and where its gradient goes; neither where the loss has fewer.
struct LossInput {
  OptionalTensor rows;
  bool normalize = false;
  float* gradient = nullptr;
};

template <class T>
bool is_packed(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kPackBytes == 0 &&
         x.stride(0) % Pack<T>::kCount == 0 && x.size(1) % Pack<T>::kCount == 0;
}

// launch(args) with a OneLaunch of T.
template <class T, class Launch>
void run_one_launch(const std::array<LossInput, 3>& inputs, const Matrix& matrix, int line_bytes,
                    int statistics, bool mean, float* result, const Target& target, const Launch& launch) {
  const Tensor& first = *inputs[0].rows;
  const std::optional<Plan> plan = make_plan(matrix, first.size(1), sizeof(T), line_bytes, target.device);
  STD_TORCH_CHECK(plan, "one_launch: a similarity matrix of ", matrix.queries, " x ", matrix.keys,
                  " rows does not fit into ", target.device.blocks, " blocks of ", target.device.shared_bytes,
                  " bytes of shared memory");
  bool packed = true, row_gradients = false;
  Input<T> given[3] = {};
  for (int i = 0; i < 3; i++) {
    const auto& [rows, normalize, gradient] = inputs[i];
    row_gradients |= gradient != nullptr;
    if (!rows) continue;
    packed &= is_packed<T>(*rows);
    given[i] = {static_cast<const T*>(rows->const_data_ptr()), rows->stride(0), normalize};
  }
  OneLaunch<T> args{{given[0], given[1], given[2]},
                    packed,
                    target.scale,
                    mean,
                    result,
                    {inputs[0].gradient, inputs[1].gradient, inputs[2].gradient},
                    target.scale_gradient,
                    *plan,
                    Work(*plan, statistics, row_gradients),
                    nullptr};
  const Tensor memory = allocated(
      "one_launch", [&] { return torch::stable::new_empty(first, {args.work.total}, ScalarType::Float); });
  args.memory = out_of<float>(memory);
  launch(args);
}

// launch(args, loss) with a OneLaunch of the inputs' type.
template <class Loss, class Launch>
void run_loss(std::array<LossInput, 3> inputs, const Matrix& matrix, const Loss& loss, bool mean,
              const Tensor& result, const Target& target, const Launch& launch) {
  const Tensor first = *inputs[0].rows;
  for (LossInput& input : inputs) {
    if (!input.rows) continue;
    STD_TORCH_CHECK(input.rows->scalar_type() == first.scalar_type(),
                    "one_launch: all inputs must have the query's dtype");
    input.rows = row_contiguous(*input.rows);
  }
  with_type(first, [&](auto zero) {
    using T = decltype(zero);
    run_one_launch<T>(inputs, matrix, line_bytes<Loss>(), Loss::kStatistics, mean, out_of<float>(result),
                      target, [&](const auto& args) { launch(args, loss); });
  });
}

// The ops' own arguments, in the order of their schemas.

struct OnePositiveArguments {
  Tensor query, positive;
  OptionalTensor negatives, query_ids, negative_ids;
  Layout layout;
  bool normalize, normalize_negatives, mean;
};

template <class Launch>
void run_one_positive(const OnePositiveArguments& in, const LossOutputs& out, const Target& target,
                      const Launch& launch) {
  const Matrix matrix =
      Matrix::one_positive(in.layout, in.query.size(0), in.negatives ? in.negatives->size(0) : 0);
  const OnePositiveLoss loss{in.layout, ids_of(in.query_ids), ids_of(in.negative_ids)};
  run_loss({{{in.query, in.normalize, out_of<float>(out.query)},
             {in.positive, in.normalize, out_of<float>(out.positive)},
             {in.negatives, in.normalize_negatives, out_of<float>(out.negatives)}}},
           matrix, loss, in.mean, out.loss, target, launch);
}

struct SupConArguments {
  Tensor query;
  OptionalTensor key;
  Tensor query_labels;
  OptionalTensor key_labels;
  bool normalize, log_of_mean, mean;
};

struct SupConOutputs {
  Tensor loss, query, key, scale;

  SupConOutputs(const Tensor& x, const OptionalTensor& y, const Tensor& factor, int64_t needs)
      : loss(torch::stable::new_empty(x, {}, ScalarType::Float)),
        query(output_like(x, x, ScalarType::Float, needed(needs, 0))),
        key(output_like(y.value_or(x), x, ScalarType::Float, y && needed(needs, 1))),
        scale(output_like(factor, factor, factor.scalar_type(), needed(needs, 2))) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const { return {loss, query, key, scale}; }
};

template <class Launch>
void run_sup_con(const SupConArguments& in, const SupConOutputs& out, const Target& target,
                 const Launch& launch) {
  const Matrix matrix =
      Matrix::all_pairs(in.query.size(0), in.key ? std::optional<int64_t>(in.key->size(0)) : std::nullopt);
  const SupConLoss loss{ids_of(in.query_labels), ids_of(in.key_labels ? *in.key_labels : in.query_labels),
                        in.log_of_mean};
  run_loss({{{in.query, in.normalize, out_of<float>(out.query)},
             {in.key, in.normalize, out_of<float>(out.key)},
             {}}},
           matrix, loss, in.mean, out.loss, target, launch);
}

}  // namespace fastcl::cuda
