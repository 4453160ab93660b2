// The vocabulary that kernels are written in: one interface, two bodies. nvcc compiles the device's; any
// other compiler the host's, on which the same kernel source runs in the tests, one thread per warp.
//
//   Block         a warp's view of its block and grid: indices, shared memory, barriers, loops and reductions
//   FragmentA     16 x 16 left operands of a product, held by one warp
//   FragmentB     16 x 16 right operands
//   Accumulator   16 x Columns sums of products in float32, held by one warp
//
// A warp runs a kernel as one program: what only one lane should do stands behind `leader()`. What one lane
// wrote, another may read after a barrier only.
//
// Products of half types are exact and summed in float32. Those of float32 are made of three TF32 products
// (Ootomo and Yokota 2022, https://arxiv.org/abs/2203.03341), so they keep about 22 bits.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/grid.h"

#ifdef __CUDACC__
#include "cuda/tile_device.cuh"
#else
#include "cuda/tile_host.h"
#endif
