// The device's side of a launch, behind an interface without CUDA headers.
#pragma once

#include "cuda/enqueue.h"
#include "cuda/mochi.h"
#include "cuda/one_launch.h"

namespace fastcl::cuda {

// What the kernels can be given on one GPU; none where it is too old for them, with the reason.
struct DeviceLimits {
  Device device;
  const char* missing;  // null: nothing
};
DeviceLimits device_limits(int index);

// On the current device; throws std::runtime_error with the kernel's name.
template <class T, class Loss>
void launch_loss(const OneLaunch<T>& args, const Loss& loss, void* stream);
template <class T, class Key>
void launch_enqueue(const Enqueue<T, Key>& args, int blocks, void* stream);
template <class T, class Key>
void launch_mixing(const Mixing<T, Key>& args, int blocks, int64_t shared_bytes, void* stream);

}  // namespace fastcl::cuda
