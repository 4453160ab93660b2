// Ops for measurements: what the products of a tile reach alone.
#include <torch/csrc/stable/library.h>

#include "call.h"
#include "cpu/run/products.h"

namespace fastcl::cpu {
namespace {

// Of the operands of products of such rows.
int64_t operand_parts(Tensor x, int64_t precision) {
  return bfloat16_parts({dtype_of(x)}, static_cast<Precision>(precision));
}

// The similarities of a tile's rows to themselves, again and again on every thread.
void repeat_logits(Tensor x, int64_t parts, int64_t repeats) {
  const Input rows = input_of(x);
  const BFloat16Side side = parts ? bfloat16_side({rows}, nullptr, static_cast<int>(parts)) : BFloat16Side{};
  const UnitRows<float> unit = unit_rows<float>({rows}, false);
  Problem<float> problem;
  problem.query = problem.key = unit.as_rows();
  problem.bfloat16 = {side.rows, side.rows, static_cast<int>(parts)};
  problem.scale2 = 1;
  for_each_task(torch::stable::get_num_threads(), [&](int64_t, Scratch& scratch) {
    const Tile<float> tile{scratch.take<float>(kTileSlot, rows.count * rows.count), rows.count, rows.count,
                           rows.count};
    const auto products = make_products(problem, rows.count, rows.count, scratch);
    products->set_lanes(0, rows.count);
    products->set_rows(0, rows.count);
    for (int64_t i = 0; i < repeats; i++) products->logits(tile);
  });
}

}  // namespace
}  // namespace fastcl::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastcl_host, m) {
  m.def("repeat_logits(Tensor x, int parts, int repeats) -> ()");
  m.def("operand_parts(Tensor x, int precision) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastcl_host, CPU, m) {
  m.impl("repeat_logits", TORCH_BOX(&fastcl::cpu::repeat_logits));
  m.impl("operand_parts", TORCH_BOX(&fastcl::cpu::operand_parts));
}
