#include "cpu/run/unit_rows.h"

namespace fastcl::cpu {

namespace {

// Squares may be beyond the range of float where the norm is not.
template <class T>
T norm_of(const T* row, int64_t width) {
  const T squared = kernels<T>().dot(row, row, width);
  if (squared > T(1e-30) && !std::isinf(squared)) return std::sqrt(squared);
  double wide = 0;
  for (int64_t d = 0; d < width; d++) wide += static_cast<double>(row[d]) * row[d];
  return static_cast<T>(std::sqrt(wide));
}

// 0 for a zero row, which so stays zero.
template <class T>
T inverse_norm(const T* row, int64_t width) {
  const T norm = norm_of(row, width);
  return norm == 0 ? T(0) : 1 / std::max(norm, T(1e-12));
}

}  // namespace

template <class T>
UnitRows<T> inverse_norms(const Input& input, bool normalize) {
  UnitRows<T> unit;
  unit.width = input.width;
  unit.stride = round_up(input.width, kernels<T>().vector);
  unit.count = input.count;
  if (!normalize) return unit;
  unit.inverse = allocate<T>(input.count);
  const Rows<T> rows = key_rows<T>(input);
  for_each_range(input.count, kRowGrain, [&](int64_t begin, int64_t end, Scratch& scratch) {
    int64_t stride;
    const T* const some = rows.tile(begin, end - begin, kQuerySlot, scratch, &stride);
    for (int64_t i = begin; i < end; i++)
      unit.inverse[i] = inverse_norm(some + (i - begin) * stride, unit.stride);
  });
  return unit;
}

template <class T>
UnitRows<T> unit_rows(std::initializer_list<Input> inputs, bool normalize) {
  const Kernels<T>& k = kernels<T>();
  UnitRows<T> unit;
  unit.width = inputs.begin()->width;
  unit.stride = round_up(unit.width, k.vector);
  for (const Input& input : inputs) unit.count += input.count;
  unit.rows = allocate<T>(unit.count * unit.stride);
  if (normalize) unit.inverse = allocate<T>(unit.count);
  for_each_range(unit.count, kRowGrain, [&](int64_t begin, int64_t end, Scratch&) {
    int64_t offset = 0;
    for (const Input& input : inputs) {
      const int64_t first = std::max(begin, offset), last = std::min(end, offset + input.count);
      if (first < last)
        k.load_rows(unit.row(first), unit.stride, input.row(first - offset), input.dtype, input.stride,
                    last - first, input.width, nullptr);
      offset += input.count;
    }
    for (int64_t i = begin; normalize && i < end; i++) {
      const T inverse = inverse_norm(unit.row(i), unit.stride);
      unit.inverse[i] = inverse;
      for (int64_t d = 0; d < unit.width; d++) unit.row(i)[d] *= inverse;
    }
  });
  return unit;
}

template <class T>
Rows<T> key_rows(const Input& input, const T* factor) {
  const bool same = input.dtype == (sizeof(T) == 4 ? DType::float32 : DType::float64);
  const bool direct = same && input.width % kernels<T>().vector == 0;
  return {input.data, input.dtype, input.stride, input.count, input.width, direct, factor};
}

int bfloat16_parts(std::initializer_list<DType> dtypes, Precision precision) {
  bool exact = true, rounded = true;
  for (DType dtype : dtypes) {
    exact &= dtype == DType::bfloat16;
    rounded &= dtype == DType::bfloat16 || dtype == DType::float32;
  }
  if (!bfloat16_kernels() || !rounded) return 0;
  if (exact || precision == Precision::medium) return 1;
  return precision == Precision::high && split_products_are_faster() ? 2 : 0;
}

bool products_fit(const float* inverse, int64_t count) {
  return !inverse || std::none_of(inverse, inverse + count, [](float x) {
    return x != 0 && !(std::abs(x) > 0x1p-50f && std::abs(x) < 0x1p+36f);
  });
}

BFloat16Side bfloat16_side(std::initializer_list<Input> inputs, const float* factor, int parts) {
  BFloat16Side side;
  int64_t count = 0;
  for (const Input& input : inputs) count += input.count;
  side.factor = allocate_filled(count, 1.0f);
  if (factor) std::copy_n(factor, count, side.factor.get());
  const Input& only = *inputs.begin();
  const bool as_it_is = inputs.size() == 1 && parts == 1 && only.dtype == DType::bfloat16 &&
                        only.width % kPairDepth == 0 && only.stride % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(only.data) % sizeof(Pair) == 0;
  const int64_t depth = round_up(only.width, kPairDepth);
  side.rows = {static_cast<const uint16_t*>(only.data), only.stride, depth, side.factor.get()};
  if (as_it_is) return side;
  side.rows.stride = parts * depth;
  side.memory = allocate<uint16_t>(count * side.rows.stride);
  side.rows.data = side.memory.get();
  int64_t offset = 0;
  for (const Input& input : inputs) {
    uint16_t* const to = side.memory.get() + offset * side.rows.stride;
    for_each_range(input.count, kRowGrain, [&](int64_t begin, int64_t end, Scratch&) {
      bfloat16_kernels()->load_rows(to + begin * side.rows.stride, depth, parts, input.row(begin),
                                    input.dtype, input.stride, end - begin, input.width);
    });
    offset += input.count;
  }
  return side;
}

BFloat16Side bfloat16_side(std::initializer_list<Input> inputs, const UnitRows<float>& unit, int parts) {
  for (const Input& input : inputs)
    if (input.dtype != DType::bfloat16 && unit.rows)
      return bfloat16_side({{unit.rows.get(), DType::float32, unit.stride, unit.count, unit.width}},
                           static_cast<const float*>(nullptr), parts);
  return bfloat16_side(inputs, unit.inverse.get(), parts);
}

BFloat16Sides bfloat16_sides(std::initializer_list<Input> query, const UnitRows<float>& unit,
                             const Input* key, const UnitRows<float>* key_unit, Precision precision) {
  BFloat16Sides sides;
  const DType dtype = query.begin()->dtype;
  const int parts = bfloat16_parts({dtype, key ? key->dtype : dtype}, precision);
  if (!parts || !products_fit(unit.inverse.get(), unit.count) ||
      (key_unit && !products_fit(key_unit->inverse.get(), key_unit->count)))
    return sides;
  sides.query = bfloat16_side(query, unit, parts);
  if (key)
    sides.key = key_unit ? bfloat16_side({*key}, *key_unit, parts)
                         : bfloat16_side({*key}, static_cast<const float*>(nullptr), parts);
  sides.problem = {sides.query.rows, key ? sides.key.rows : sides.query.rows, parts};
  return sides;
}

namespace {

// `inverse`: the row's inverse norm, null without normalization.
template <class T>
Chain<T> chain_of(T scale, const T* inverse) {
  return {scale, inverse ? *inverse : T(1), inverse && *inverse < T(1e12)};
}

}  // namespace

template <class T>
T input_gradient(const UnitRows<T>& unit, int64_t i, T scale, const T* sum, T* out) {
  const Chain<T> chain = chain_of(scale, unit.inverse ? unit.inverse.get() + i : nullptr);
  return kernels<T>().row_gradient(unit.row(i), T(1), sum, unit.width, chain, out);
}

template <class T>
void write_key_gradients(const Rows<T>& keys, const T* inverse, T scale, int64_t begin, int64_t count,
                         const T* sums, int64_t sums_stride, T* out, Scratch& scratch) {
  int64_t stride;
  const T* const rows = keys.without_factors().tile(begin, count, kKeySlot, scratch, &stride);
  for (int64_t r = 0; r < count; r++) {
    const int64_t i = begin + r;
    const Chain<T> chain = chain_of(scale, inverse ? inverse + i : nullptr);
    kernels<T>().row_gradient(rows + r * stride, keys.factor ? keys.factor[i] : T(1), sums + r * sums_stride,
                              keys.width, chain, out + i * keys.width);
  }
}

template <class T>
SoftPlus<T> softplus(T x) {
  const T decay = std::exp(-std::abs(x));
  if (std::isnan(x)) return {x, x};
  return {std::max(x, T(0)) + std::log1p(decay), (x >= 0 ? T(1) : decay) / (1 + decay)};
}

#define FASTCL_INSTANTIATE(T)                                                                                \
  template UnitRows<T> unit_rows<T>(std::initializer_list<Input>, bool);                                     \
  template UnitRows<T> inverse_norms<T>(const Input&, bool);                                                 \
  template Rows<T> key_rows<T>(const Input&, const T*);                                                      \
  template T input_gradient<T>(const UnitRows<T>&, int64_t, T, const T*, T*);                                \
  template void write_key_gradients<T>(const Rows<T>&, const T*, T, int64_t, int64_t, const T*, int64_t, T*, \
                                       Scratch&);                                                            \
  template SoftPlus<T> softplus<T>(T);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)

}  // namespace fastcl::cpu
