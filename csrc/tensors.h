// What ops need of torch's stable tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <stdexcept>
#include <string>

namespace fastcl::shared {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const int64_t* ids_of(const OptionalTensor& ids) {
  return ids ? static_cast<const int64_t*>(ids->const_data_ptr()) : nullptr;
}
template <class T>
T* out_of(const Tensor& x) {
  return x.numel() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}
// With the last dimension contiguous; rows may be any distance apart.
inline Tensor row_contiguous(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

// use(zero) with a zero of the tensor's type, one of those the CUDA kernels take.
template <class Use>
void with_type(const Tensor& x, const Use& use) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return use(0.0f);
    case ScalarType::Half:
      return use(c10::Half());
    case ScalarType::BFloat16:
      return use(c10::BFloat16());
    default:
      STD_TORCH_CHECK(false, "the CUDA kernels take float32, float16 and bfloat16");
  }
}

// Whether an op's input needs a gradient, counted among those that may.
inline bool needed(int64_t needs, int input) { return needs >> input & 1; }

// What make() allocates for a kernel; where that fails the stable ABI does not say for what.
template <class Make>
auto allocated(const char* kernel, const Make& make) {
  try {
    return make();
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(kernel) + ": allocating memory failed: " + error.what());
  }
}

// Like `shape`, on the device of `x`; empty where it is not wanted.
inline Tensor output_like(const Tensor& shape, const Tensor& x, ScalarType dtype, bool wanted) {
  return wanted ? torch::stable::new_empty(x, shape.sizes(), dtype) : torch::stable::new_empty(x, {0}, dtype);
}

// What the whole-loss op returns: the loss and, of the wanted inputs, the gradients for an incoming 1.
struct LossOutputs {
  Tensor loss, query, positive, negatives, scale;

  LossOutputs(const Tensor& x, const OptionalTensor& y, const OptionalTensor& z, const Tensor& factor,
              ScalarType dtype, int64_t needs)
      : loss(torch::stable::new_empty(x, {}, dtype)),
        query(output_like(x, x, dtype, needed(needs, 0))),
        positive(output_like(y.value_or(x), x, dtype, y && needed(needs, 1))),
        negatives(output_like(z.value_or(x), x, dtype, z && needed(needs, 2))),
        scale(output_like(factor, factor, factor.scalar_type(), needed(needs, 3))) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> all() const {
    return {loss, query, positive, negatives, scale};
  }
};

}  // namespace fastcl::shared
namespace fastcl {
using namespace shared;
}
