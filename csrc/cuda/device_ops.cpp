// The CUDA ops: from the dispatcher to the launch without waiting for the device.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <mutex>
#include <string>
#include <tuple>

#include "cuda/device.h"
#include "cuda/enqueue_op.h"
#include "cuda/mochi_op.h"
#include "cuda/one_launch_op.h"

namespace fastcl::cuda {
namespace {

using CurrentStream = AOTITorchError (*)(int32_t, void**);

// Lives in torch's CUDA library, which this one does not link, so that it loads where that one is absent.
CurrentStream find_current_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = dlsym(torch_cuda ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(found, "fastcl: this torch has no CUDA support");
  return reinterpret_cast<CurrentStream>(found);
}
void* current_stream(int device) {
  static const CurrentStream find = find_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(find(device, &stream));
  return stream;
}

// Asked once per device.
const DeviceLimits& limits_of(int device) {
  static std::array<std::once_flag, 64> asked;
  static std::array<DeviceLimits, 64> limits;
  std::call_once(asked.at(device), [=] { limits[device] = device_limits(device); });
  return limits[device];
}

const Device& usable_device(int index, const char* kernel) {
  const DeviceLimits& limits = limits_of(index);
  STD_TORCH_CHECK(!limits.missing, kernel, ": ", limits.missing);
  return limits.device;
}

// run(target, launch) on the current stream of the query's device.
template <class Run>
void run_on_device(const Tensor& query, const Tensor& scale, const Tensor& scale_gradient, const Run& run) {
  const int device = query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, "one_launch: scale must be float32");
  run(Target{usable_device(device, "one_launch"), static_cast<const float*>(scale.const_data_ptr()),
             out_of<float>(scale_gradient)},
      [=](const auto& args, const auto& loss) { launch_loss(args, loss, current_stream(device)); });
}

auto one_positive(Tensor query, OptionalTensor positive, OptionalTensor negatives, Tensor scale,
                  OptionalTensor query_ids, OptionalTensor negative_ids, int64_t layout, bool normalize,
                  bool normalize_negatives, bool decoupled, bool mean, int64_t /*precision*/, int64_t needs) {
  STD_TORCH_CHECK(!decoupled && positive,
                  "the CUDA kernels have no decoupled loss and no assigned positives");
  const auto outputs = allocated(
      "one_launch", [&] { return LossOutputs(query, positive, negatives, scale, ScalarType::Float, needs); });
  run_on_device(query, scale, outputs.scale, [&](const Target& target, const auto& launch) {
    run_one_positive({query, *positive, negatives, query_ids, negative_ids, static_cast<Layout>(layout),
                      normalize, normalize_negatives, mean},
                     outputs, target, launch);
  });
  return outputs.all();
}

auto sup_con(Tensor query, OptionalTensor key, Tensor scale, Tensor query_labels, OptionalTensor key_labels,
             OptionalTensor positive_mask, bool normalize, bool log_of_mean, bool mean, int64_t /*precision*/,
             int64_t needs) {
  STD_TORCH_CHECK(!positive_mask, "the CUDA kernels take labels, no mask");
  const auto outputs = allocated("one_launch", [&] { return SupConOutputs(query, key, scale, needs); });
  run_on_device(query, scale, outputs.scale, [&](const Target& target, const auto& launch) {
    run_sup_con({query, key, query_labels, key_labels, normalize, log_of_mean, mean}, outputs, target,
                launch);
  });
  return outputs.all();
}

void enqueue(Tensor keys, OptionalTensor ids, Tensor pointer, Tensor new_keys, OptionalTensor new_ids) {
  const int device = keys.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int blocks = enqueue_blocks(new_keys.size(0), usable_device(device, "enqueue"));
  run_enqueue(keys, ids, pointer, new_keys, new_ids,
              [=](const auto& args) { launch_enqueue(args, blocks, current_stream(device)); });
}

auto mix_negatives(Tensor query, Tensor positive, Tensor scale, Tensor keys, Tensor hard, Tensor queue_max,
                   Tensor queue_sum, Tensor queue_mean, Tensor first, Tensor second, Tensor alpha,
                   Tensor partner, Tensor beta) {
  const int device = query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto outputs = allocated("mix_negatives", [&] { return MixingOutputs(query); });
  run_mixing({query, positive, scale, keys, hard, queue_max, queue_sum, queue_mean, first, second, alpha,
              partner, beta},
             outputs, usable_device(device, "mix_negatives"),
             [=](const auto& args, int blocks, int64_t shared_bytes) {
               launch_mixing(args, blocks, shared_bytes, current_stream(device));
             });
  return outputs.all();
}

// How many blocks the device runs at once, the shared memory of each, and why it cannot serve at all, or "".
std::tuple<int64_t, int64_t, std::string> cuda_limits(int64_t device) {
  const DeviceLimits& limits = limits_of(static_cast<int>(device));
  return {limits.device.blocks, limits.device.shared_bytes, limits.missing ? limits.missing : ""};
}

}  // namespace
}  // namespace fastcl::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastcl_native, m) { m.def("cuda_limits(int device) -> (int, int, str)"); }
STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_limits", TORCH_BOX(&fastcl::cuda::cuda_limits));
}
// the schemas of these are in host_ops.cpp
STABLE_TORCH_LIBRARY_IMPL(fastcl_native, CUDA, m) {
  m.impl("enqueue", TORCH_BOX(&fastcl::cuda::enqueue));
  m.impl("mix_negatives", TORCH_BOX(&fastcl::cuda::mix_negatives));
}
// of these in Python
STABLE_TORCH_LIBRARY_IMPL(fastcl, CUDA, m) {
  m.impl("one_positive", TORCH_BOX(&fastcl::cuda::one_positive));
  m.impl("sup_con", TORCH_BOX(&fastcl::cuda::sup_con));
}
