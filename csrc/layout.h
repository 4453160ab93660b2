// What the losses with one positive per row compare the rows with: the Python side's numbers.
#pragma once

namespace fastcl::shared {

enum class Layout : int { views, batch, pairs, negatives, paired, assigned };

}  // namespace fastcl::shared
namespace fastcl {
using namespace shared;
}
