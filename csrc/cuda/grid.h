// The shape of a grid, on both sides of a launch.
#pragma once

#include <cstdint>

namespace fastcl::cuda {

constexpr int kWarps = 8;  // of a block
constexpr int kLanes = 32;
constexpr int kFragment = 16;  // rows, columns and depth of a fragment

// What a device, or a test, offers to a grid whose blocks all live at once.
struct Device {
  int blocks;
  int64_t shared_bytes;  // of each
};

}  // namespace fastcl::cuda
