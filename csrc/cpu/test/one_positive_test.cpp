// The losses with one positive per row, with their gradients, against the dense formula in double precision.
#include "cpu/losses/one_positive.h"

#include <cstring>

#include "cpu/test/data.h"
#include "cpu/test/harness.h"
#include "cpu/test/tests.h"

namespace fastcl::cpu {
namespace {

using Dense = std::vector<std::vector<double>>;

Dense zeros(size_t rows, size_t width) { return Dense(rows, std::vector<double>(width)); }
double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t d = 0; d < a.size(); d++) sum += a[d] * b[d];
  return sum;
}
void add_scaled(std::vector<double>& y, const std::vector<double>& x, double alpha) {
  for (size_t d = 0; d < y.size(); d++) y[d] += alpha * x[d];
}
Dense unit(const Dense& x) {
  Dense u = x;
  for (std::vector<double>& row : u) {
    const double norm = std::sqrt(dot(row, row));
    for (double& component : row) component /= norm;
  }
  return u;
}
// From the gradient of the unit rows that of the rows.
Dense through_norm(const Dense& x, Dense gradient) {
  const Dense u = unit(x);
  for (size_t i = 0; i < x.size(); i++) {
    add_scaled(gradient[i], u[i], -dot(u[i], gradient[i]));
    for (double& component : gradient[i]) component /= std::sqrt(dot(x[i], x[i]));
  }
  return gradient;
}

struct Result {
  double loss = 0, scale = 0;
  Dense query, positive, negatives;  // gradients
};

// The losses of the rows of x, whose row i has the positive p[i] and the negatives y[j] but for those that
// are excluded(i, j); `weight` each. Gradients are of unit rows.
template <class Excluded>
void add_losses(const Dense& x, const Dense& p, const Dense& y, double scale, double weight,
                const Excluded& excluded, Result& sums, Dense& of_x, Dense& of_p, Dense& of_y) {
  for (size_t i = 0; i < x.size(); i++) {
    const double similarity = dot(x[i], p[i]);
    double all = 1;  // relative to the positive
    for (size_t j = 0; j < y.size(); j++)
      if (!excluded(i, j)) all += std::exp(scale * (dot(x[i], y[j]) - similarity));
    sums.loss += weight * std::log(all);
    auto pull = [&](const std::vector<double>& other, std::vector<double>& of_other, double gradient) {
      add_scaled(of_x[i], other, gradient * scale);
      add_scaled(of_other, x[i], gradient * scale);
      sums.scale += gradient * dot(x[i], other);
    };
    pull(p[i], of_p[i], weight * (1 / all - 1));
    for (size_t j = 0; j < y.size(); j++)
      if (!excluded(i, j))
        pull(y[j], of_y[j], weight * std::exp(scale * (dot(x[i], y[j]) - similarity)) / all);
  }
}

// Query i's, of the assigned layout: some keys are several queries', others nobody's.
size_t assigned_to(size_t i, size_t keys) { return i / 2 * 5 % keys; }

Result exact(Layout layout, const Dense& query, const Dense& positive, const Dense& negatives, double scale) {
  const Dense q = unit(query), p = unit(positive), k = unit(negatives);
  const size_t n = q.size(), width = q[0].size();
  Result result;
  Dense of_q = zeros(n, width), of_p = of_q, of_k = zeros(k.size(), width);
  auto own = [](size_t i, size_t j) { return i == j; };
  if (layout == Layout::views) {
    Dense both = q, swapped = p;
    both.insert(both.end(), p.begin(), p.end());
    swapped.insert(swapped.end(), q.begin(), q.end());
    Dense of_x = zeros(2 * n, width), of_swapped = of_x, of_y = of_x;
    auto same = [&](size_t i, size_t j) { return i % n == j % n; };
    add_losses(both, swapped, both, scale, 0.5 / n, same, result, of_x, of_swapped, of_y);
    for (size_t i = 0; i < 2 * n; i++) {
      std::vector<double>& row = i < n ? of_q[i] : of_p[i - n];
      add_scaled(row, of_x[i], 1);
      add_scaled(row, of_y[i], 1);
      add_scaled(row, of_swapped[(i + n) % (2 * n)], 1);
    }
  } else if (layout == Layout::negatives) {
    add_losses(q, p, k, scale, 1.0 / n, [](size_t, size_t) { return false; }, result, of_q, of_p, of_k);
  } else if (layout == Layout::assigned) {
    Dense picked = zeros(n, width);
    for (size_t i = 0; i < n; i++) picked[i] = k[assigned_to(i, k.size())];
    auto is_positive = [&](size_t i, size_t j) { return j == assigned_to(i, k.size()); };
    add_losses(q, picked, k, scale, 1.0 / n, is_positive, result, of_q, of_p, of_k);
    for (size_t i = 0; i < n; i++) add_scaled(of_k[assigned_to(i, k.size())], of_p[i], 1);
  } else {
    const bool pairs = layout == Layout::pairs;
    Dense of_other = of_p;
    add_losses(q, p, p, scale, (pairs ? 0.5 : 1.0) / n, own, result, of_q, of_p, of_p);
    if (pairs) add_losses(p, q, q, scale, 0.5 / n, own, result, of_p, of_q, of_q);
  }
  result.query = through_norm(query, of_q);
  result.positive = through_norm(positive, of_p);
  if (!negatives.empty()) result.negatives = through_norm(negatives, of_k);
  return result;
}

// Random rows of a dtype, and what they are in double precision.
struct Rows {
  std::vector<char> memory;
  Dense dense;
  Input input;
};
Rows random_rows(Random& random, DType dtype, int64_t count, int64_t width) {
  Rows rows;
  rows.dense = zeros(count, width);
  rows.memory.resize(count * width * 8 + 64);
  for (int64_t i = 0; i < count * width; i++) {
    const double value = random.between(-1, 1);  // of six bits: the same in every dtype
    rows.dense[i / width][i % width] = value;
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    const uint16_t upper = static_cast<uint16_t>(bits >> 16);
    char* const to = rows.memory.data() + i * bytes_of(dtype);
    if (dtype == DType::float64) std::memcpy(to, &value, sizeof value);
    if (dtype == DType::float32) std::memcpy(to, &single, sizeof single);
    if (dtype == DType::bfloat16) std::memcpy(to, &upper, sizeof upper);
  }
  rows.input = {rows.memory.data(), dtype, width, count, width};
  return rows;
}

template <class T>
double error_of(const std::vector<T>& got, const Dense& exact) {
  double error = 0, size = 0;
  for (size_t i = 0; i < exact.size(); i++)
    for (size_t d = 0; d < exact[i].size(); d++) {
      error += std::pow(got[i * exact[i].size() + d] - exact[i][d], 2);
      size += std::pow(exact[i][d], 2);
    }
  return std::sqrt(error / size);
}

template <class T>
void check_loss(Layout layout, DType dtype, int64_t count, int64_t width) {
  constexpr double kScale = 5;
  Random random(static_cast<uint32_t>(100 * count + width));
  const Rows query = random_rows(random, dtype, count, width),
             positive = random_rows(random, dtype, count, width),
             negatives = random_rows(random, dtype, layout >= Layout::negatives ? 3 * count + 1 : 0, width);
  std::vector<int64_t> assigned;
  for (int64_t i = 0; i < count; i++) assigned.push_back(assigned_to(i, 3 * count + 1));
  const bool has_positives = layout != Layout::assigned;
  OnePositive args{};
  args.query = query.input;
  if (has_positives) args.positive = positive.input;
  if (!has_positives) args.query_ids = assigned.data();
  args.negatives = negatives.input;
  args.scale = kScale;
  args.layout = layout;
  args.normalize = args.normalize_negatives = args.mean = true;
  T loss = NAN;
  double scale = NAN;
  std::vector<T> of_query(count * width, T(NAN)), of_positive = of_query,
                                                  of_negatives(negatives.input.count * width, T(NAN));
  const bool has_negatives = negatives.input.count > 0;
  one_positive<T>(args, {&loss, of_query.data(), has_positives ? of_positive.data() : nullptr,
                         has_negatives ? of_negatives.data() : nullptr, &scale});
  const Result result = exact(layout, query.dense, positive.dense, negatives.dense, kScale);
  // bfloat16 rows may be multiplied by weights that are rounded to bfloat16
  const double gradient_bound = dtype == DType::bfloat16 ? 4e-3 : 64 * kEpsilon<T>;
  check("one_positive", std::abs(loss / result.loss - 1), 32 * kEpsilon<T>);
  check("one_positive, gradient of the scale", std::abs(scale - result.scale), gradient_bound);
  check("one_positive, gradient of the query", error_of(of_query, result.query), gradient_bound);
  if (has_positives)
    check("one_positive, gradient of the positive", error_of(of_positive, result.positive), gradient_bound);
  if (has_negatives)
    check("one_positive, gradient of the negatives", error_of(of_negatives, result.negatives),
          gradient_bound);
}

}  // namespace

void check_one_positive() {
  for (const Layout layout :
       {Layout::views, Layout::batch, Layout::pairs, Layout::negatives, Layout::assigned}) {
    for (const int64_t count : {2, 7, 33, 70}) {
      for (const int64_t width : {2, 33, 128}) {
        check_loss<float>(layout, DType::float32, count, width);
        check_loss<float>(layout, DType::bfloat16, count, width);
        check_loss<double>(layout, DType::float64, count, width);
      }
    }
  }
}

}  // namespace fastcl::cpu
