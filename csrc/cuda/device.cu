#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/enqueue.cuh"
#include "cuda/mochi.cuh"
#include "cuda/one_launch.cuh"

namespace fastcl::cuda {

namespace {

template <class T, class Cell, class Loss>
__global__ void __launch_bounds__(kWarps* kLanes, 1)
    one_launch(const __grid_constant__ OneLaunch<T> args, const __grid_constant__ Loss loss) {
  const Block block;
  OneLaunchKernel<T, Cell, Loss>(block, args, loss).run();
}

template <class T, class Key>
__global__ void __launch_bounds__(kWarps* kLanes, 1) enqueue(const __grid_constant__ Enqueue<T, Key> args) {
  enqueue_rows(Block(), args);
}

template <class T, class Key>
__global__ void __launch_bounds__(kWarps* kLanes, 1)
    mix_negatives(const __grid_constant__ Mixing<T, Key> args) {
  const Block block;
  MixingKernel<T, Key>(block, args).run();
}

void check(cudaError_t status, const char* kernel, const char* step) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch does not report it again
  throw std::runtime_error(std::string(kernel) + ": " + step + " failed: " + cudaGetErrorString(status));
}

// On all blocks at once; does not wait for them.
template <class... Args>
void launch(void (*kernel)(Args...), const char* name, int blocks, int64_t shared_bytes, void* stream,
            const std::type_identity_t<Args>&... args) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name,
        "reserving shared memory");
  void* parameters[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(
      cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(kWarps * kLanes),
                                  parameters, shared_bytes, static_cast<cudaStream_t>(stream)),
      name, "launch");
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "fastcl", "reading the device's properties");
  return value;
}

// The runtime is linked in, and need not be torch's. A driver serves all runtimes of its major version.
bool driver_is_too_old() {
  constexpr int kMajor = 1000;
  int driver = 0;
  return cudaDriverGetVersion(&driver) != cudaSuccess || driver / kMajor < CUDART_VERSION / kMajor;
}

}  // namespace

DeviceLimits device_limits(int index) {
  if (driver_is_too_old()) return {{}, "the driver is older than the CUDA that the kernels were built with"};
  if (attribute(cudaDevAttrComputeCapabilityMajor, index) < 8)
    return {{}, "the GPU's compute capability is below 8.0"};
  if (!attribute(cudaDevAttrCooperativeLaunch, index)) return {{}, "the GPU has no cooperative launch"};
  return {{attribute(cudaDevAttrMultiProcessorCount, index),
           attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)},
          nullptr};
}

template <class T, class Loss>
void launch_loss(const OneLaunch<T>& args, const Loss& loss, void* stream) {
  with_cell_type<T>(args.plan, [&](auto zero) {
    launch(one_launch<T, decltype(zero), Loss>, "one_launch", args.plan.blocks, args.plan.shared_bytes(),
           stream, args, loss);
  });
}

template <class T, class Key>
void launch_enqueue(const Enqueue<T, Key>& args, int blocks, void* stream) {
  launch(enqueue<T, Key>, "enqueue", blocks, 0, stream, args);
}

template <class T, class Key>
void launch_mixing(const Mixing<T, Key>& args, int blocks, int64_t shared_bytes, void* stream) {
  launch(mix_negatives<T, Key>, "mix_negatives", blocks, shared_bytes, stream, args);
}

#define FASTCL_INSTANTIATE_FOR_KEYS(T, Key)                                 \
  template void launch_enqueue<T, Key>(const Enqueue<T, Key>&, int, void*); \
  template void launch_mixing<T, Key>(const Mixing<T, Key>&, int, int64_t, void*);
#define FASTCL_INSTANTIATE(T)                                                       \
  template void launch_loss<T>(const OneLaunch<T>&, const OnePositiveLoss&, void*); \
  template void launch_loss<T>(const OneLaunch<T>&, const SupConLoss&, void*);      \
  FASTCL_INSTANTIATE_FOR_KEYS(T, float)                                             \
  FASTCL_INSTANTIATE_FOR_KEYS(T, c10::Half)                                         \
  FASTCL_INSTANTIATE_FOR_KEYS(T, c10::BFloat16)
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(c10::Half)
FASTCL_INSTANTIATE(c10::BFloat16)

}  // namespace fastcl::cuda
