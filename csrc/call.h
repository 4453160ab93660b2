// A statistics call, from tensors.
#pragma once

#include <vector>

#include "cpu/losses/similarity.h"
#include "tensors.h"

namespace fastcl::cpu {

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      return DType::float32;
  }
}
inline bool is_double(const Tensor& x) { return dtype_of(x) == DType::float64; }

inline Input input_of(const Tensor& x) {
  return {x.const_data_ptr(), dtype_of(x), x.stride(0), x.size(0), x.size(1)};
}

inline Mask mask_of(const Tensor& x) {
  return {static_cast<const uint8_t*>(x.const_data_ptr()), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

// The rule of a call, as Python gives it: in a list, two tensors of ids or one mask for each set.
struct RuleArguments {
  std::vector<Tensor> exclude, positive, only;
  OptionalTensor within_query, within_key, exclude_keys;
};

// Keeps what the arguments of a statistics op point into.
struct StatsCall {
  Tensor query, key;
  std::vector<Tensor> kept;
  SimilarityCall call;

  StatsCall(const Tensor& x, const Tensor& y, const OptionalTensor& scale, const OptionalTensor& key_scale,
            const OptionalTensor& bias2, const RuleArguments& rule, bool normalize, bool symmetric,
            int64_t precision, bool columns, double second_scale = 0)
      : query(row_contiguous(x)), key(symmetric ? query : row_contiguous(y)) {
    call = {input_of(query),
            input_of(key),
            scale ? *static_cast<const double*>(scale->const_data_ptr()) : 1.0,
            key_scale ? data(*key_scale) : nullptr,
            bias2 ? data(*bias2) : nullptr,
            {sets(rule.exclude), sets(rule.positive), sets(rule.only), {}, nullptr, 0},
            normalize,
            symmetric,
            columns,
            static_cast<Precision>(precision),
            second_scale};
    if (rule.within_query) call.rule.within = ids(*rule.within_key, *rule.within_query);
    if (rule.exclude_keys) {
      call.rule.exclude_keys = static_cast<const int64_t*>(data(*rule.exclude_keys));
      call.rule.excluded_per_query = rule.exclude_keys->size(1);
    }
  }

 private:
  const void* data(const Tensor& x) {
    kept.push_back(torch::stable::contiguous(x));
    return kept.back().const_data_ptr();
  }
  Ids ids(const Tensor& of_keys, const Tensor& of_queries) {
    return {static_cast<const int64_t*>(data(of_keys)), static_cast<const int64_t*>(data(of_queries))};
  }
  PairSets sets(const std::vector<Tensor>& given) {
    PairSets result;
    for (size_t i = 0; i < given.size(); i++) {
      const Tensor& x = given[i];
      if (x.dim() == 1) {
        result.ids.push_back(ids(given[++i], x));
      } else {
        kept.push_back(x);
        result.masks.push_back(mask_of(x));
      }
    }
    return result;
  }
};

inline ScalarType compute_type(const Tensor& x) {
  return is_double(x) ? ScalarType::Double : ScalarType::Float;
}

}  // namespace fastcl::cpu
