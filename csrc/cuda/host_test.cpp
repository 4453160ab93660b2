// The kernels on the host against dense float64 loops, as a program of its own for the thread and address
// sanitizers, which a whole torch does not survive.
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/enqueue.cuh"
#include "cuda/mochi.cuh"
#include "cuda/one_launch_host.h"

namespace fastcl::cuda {
namespace {

using Rows = std::vector<std::vector<double>>;

template <class T>
std::vector<T> random_rows(int64_t count, int64_t width, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(count * width);
  for (T& value : values) value = static_cast<T>(normal(generator));
  return values;
}

// Unit rows of values + step * direction.
template <class T>
Rows unit_rows(const std::vector<T>& values, const std::vector<float>& direction, double step,
               int64_t width) {
  Rows rows(values.size() / width, std::vector<double>(width));
  for (size_t i = 0; i < rows.size(); i++) {
    double squares = 0;
    for (int64_t d = 0; d < width; d++) {
      const size_t at = i * width + d;
      rows[i][d] = static_cast<float>(values[at]) + step * direction[at];
      squares += rows[i][d] * rows[i][d];
    }
    for (double& x : rows[i]) x /= std::sqrt(squares);
  }
  return rows;
}

double dot(const std::vector<double>& x, const std::vector<double>& y) {
  double sum = 0;
  for (size_t d = 0; d < x.size(); d++) sum += x[d] * y[d];
  return sum;
}

// Cross-entropy of row i of x against row i of y, among all rows of y and, where asked, all others of x.
double mean_loss(const Rows& x, const Rows& y, double scale, bool own_side) {
  double total = 0;
  for (size_t i = 0; i < x.size(); i++) {
    double sum = 0;
    for (size_t j = 0; j < y.size(); j++) {
      sum += std::exp(scale * dot(x[i], y[j]));
      if (own_side && j != i) sum += std::exp(scale * dot(x[i], x[j]));
    }
    total += std::log(sum) - scale * dot(x[i], y[i]);
  }
  return total / x.size();
}

double exact_loss(Layout layout, const Rows& x, const Rows& y, double scale) {
  const bool views = layout == Layout::views;
  const double forth = mean_loss(x, y, scale, views);
  return layout == Layout::batch ? forth : (forth + mean_loss(y, x, scale, views)) / 2;
}

// The mean over x of SupCon's loss among the rows of y, whose row i is x's own; labels are i % 5.
double exact_sup_con(const Rows& x, const Rows& y, double scale, bool log_of_mean) {
  double total = 0;
  for (size_t i = 0; i < x.size(); i++) {
    double all = 0, positives = 0, logits = 0;
    int count = 0;
    for (size_t j = 0; j < y.size(); j++) {
      if (i == j) continue;
      const double logit = scale * dot(x[i], y[j]);
      all += std::exp(logit);
      if (i % 5 != j % 5) continue;
      positives += std::exp(logit), logits += logit, count++;
    }
    if (count) total += std::log(all) - (log_of_mean ? std::log(positives / count) : logits / count);
  }
  return total / x.size();
}

// The loss and its derivatives by the scale and along a random direction of both inputs, against those of
// exact(x, y, scale).
template <class T, class Loss, class Exact>
bool check(const char* name, const Matrix& matrix, const Loss& loss, int64_t width, Device device,
           double tolerance, const Exact& exact) {
  const int64_t count = matrix.second_input, others = matrix.rows - count;
  const std::vector<T> x = random_rows<T>(count, width, 1), y = random_rows<T>(others, width, 2);
  const float scale = 5;
  float value, scale_gradient;
  std::vector<float> query(x.size(), NAN), key(y.size(), NAN);
  const Plan plan = make_plan(matrix, width, sizeof(T), line_bytes<Loss>(), device).value();
  const Work work(plan, Loss::kStatistics, true);
  std::vector<float> memory(work.total, NAN);
  const OneLaunch<T> args{{{x.data(), width, true}, {y.data(), width, true}, {}},
                          false,
                          &scale,
                          true,
                          &value,
                          {query.data(), key.data(), nullptr},
                          &scale_gradient,
                          plan,
                          work,
                          memory.data()};
  run_on_host(args, loss);

  const std::vector<float> along_x = random_rows<float>(count, width, 3),
                           along_y = random_rows<float>(others, width, 4);
  auto exact_at = [&](double step, double at) {
    return exact(unit_rows(x, along_x, step, width), unit_rows(y, along_y, step, width), at);
  };
  auto near = [&](double got, double wanted) { return std::abs(got - wanted) <= tolerance; };
  const double step = 1e-4, wanted = exact_at(0, scale);
  const double by_scale = (exact_at(0, scale + step) - exact_at(0, scale - step)) / (2 * step);
  const double by_input = (exact_at(step, scale) - exact_at(-step, scale)) / (2 * step);
  double got_by_input = 0;
  for (size_t i = 0; i < x.size(); i++) got_by_input += query[i] * along_x[i];
  for (size_t i = 0; i < y.size(); i++) got_by_input += key[i] * along_y[i];
  const bool right = near(value, wanted) && near(scale_gradient, by_scale) && near(got_by_input, by_input);
  std::printf(
      "%s %s, %d x %ld on %d blocks of %d byte cells: loss %.6f (%.6f), by scale %.6f (%.6f), by input %.6f "
      "(%.6f)\n",
      right ? "ok  " : "FAIL", name, matrix.rows, long(width), plan.blocks, plan.storage.cell_bytes, value,
      wanted, scale_gradient, by_scale, got_by_input, by_input);
  return right;
}

template <class T>
bool check_one_positive(Layout layout, int64_t samples, int64_t width, Device device, double tolerance) {
  return check<T>(
      "one positive", Matrix::one_positive(layout, samples, 0), OnePositiveLoss{layout, nullptr, nullptr},
      width, device, tolerance,
      [=](const Rows& x, const Rows& y, double scale) { return exact_loss(layout, x, y, scale); });
}

template <class T>
bool check_sup_con(int64_t queries, std::optional<int64_t> keys, bool log_of_mean, int64_t width,
                   Device device, double tolerance) {
  std::vector<int64_t> labels(std::max(queries, keys.value_or(0)));
  for (size_t i = 0; i < labels.size(); i++) labels[i] = i % 5;
  return check<T>("SupCon", Matrix::all_pairs(queries, keys),
                  SupConLoss{labels.data(), labels.data(), log_of_mean}, width, device, tolerance,
                  [=](const Rows& x, const Rows& y, double scale) {
                    return exact_sup_con(x, keys ? y : x, scale, log_of_mean);
                  });
}

// Per row: cross-entropy of the positive among the queue and given synthetic negatives.
double mochi_loss(const std::vector<double>& query, const std::vector<double>& positive, const Rows& queue,
                  const Rows& synthetic, double scale) {
  double sum = std::exp(scale * dot(query, positive));
  for (const Rows* keys : {&queue, &synthetic})
    for (const auto& key : *keys) sum += std::exp(scale * dot(query, key));
  return std::log(sum) - scale * dot(query, positive);
}

template <class T, class Key>
bool check_mixing(int blocks, double tolerance) {
  constexpr int kRows = 5, kWidth = 37, kSize = 30, kHard = 19, kMix = 21, kQueryMix = 11;
  const std::vector<T> x = random_rows<T>(kRows, kWidth, 6), y = random_rows<T>(kRows, kWidth, 7);
  std::vector<Key> keys = random_rows<Key>(kSize, kWidth, 8);
  for (Key& key : keys) key = static_cast<Key>(static_cast<float>(key) / std::sqrt(float(kWidth)));
  const float scale = 5;
  std::mt19937 generator(9);
  auto drawn = [&](int count, int below) {
    std::vector<int64_t> values(kRows * count);
    for (int64_t& value : values) value = generator() % below;
    return values;
  };
  const std::vector<int64_t> hard = drawn(kHard, kSize), first = drawn(kMix, kHard),
                             second = drawn(kMix, kHard), partner = drawn(kQueryMix, kHard);
  std::vector<float> alpha(kRows * kMix), beta(kRows * kQueryMix);
  for (float& value : alpha) value = generator() % 1000 * 1e-3f;
  for (float& value : beta) value = generator() % 500 * 1e-3f;

  const std::vector<float> zero(x.size()), along_x = random_rows<float>(kRows, kWidth, 10),
                                           along_y = random_rows<float>(kRows, kWidth, 11);
  const Rows query = unit_rows(x, zero, 0, kWidth);
  Rows queue(kSize, std::vector<double>(kWidth));
  for (size_t i = 0; i < keys.size(); i++) queue[i / kWidth][i % kWidth] = static_cast<float>(keys[i]);
  auto mix = [&](int row, double weight, const std::vector<double>& u, int64_t rank) {
    const std::vector<double>& v = queue[hard[row * kHard + rank]];
    std::vector<double> mixed(kWidth);
    for (int d = 0; d < kWidth; d++) mixed[d] = weight * u[d] + (1 - weight) * v[d];
    const double length = std::sqrt(dot(mixed, mixed));
    for (double& value : mixed) value /= length;
    return mixed;
  };
  std::vector<Rows> synthetic(kRows);
  std::vector<float> queue_max(kRows), queue_sum(kRows), queue_mean(kRows * kWidth);
  for (int row = 0; row < kRows; row++) {
    for (int h = row * kMix; h < (row + 1) * kMix; h++)
      synthetic[row].push_back(mix(row, alpha[h], queue[hard[row * kHard + first[h]]], second[h]));
    for (int h = row * kQueryMix; h < (row + 1) * kQueryMix; h++)
      synthetic[row].push_back(mix(row, beta[h], query[row], partner[h]));
    double sum = 0;
    std::vector<double> mean(kWidth);
    queue_max[row] = 1.5f;
    for (const auto& key : queue) {
      const double weight = std::exp2(scale * kLog2E * dot(query[row], key) - queue_max[row]);
      sum += weight;
      for (int d = 0; d < kWidth; d++) mean[d] += weight * key[d];
    }
    queue_sum[row] = sum;
    for (int d = 0; d < kWidth; d++) queue_mean[row * kWidth + d] = mean[d] / sum;
  }

  std::vector<float> loss(kRows, NAN), grad_x(x.size(), NAN), grad_y(y.size(), NAN), grad_scale(kRows, NAN);
  const Mixing<T, Key> args{x.data(),
                            y.data(),
                            kWidth,
                            kWidth,
                            keys.data(),
                            &scale,
                            hard.data(),
                            queue_max.data(),
                            queue_sum.data(),
                            queue_mean.data(),
                            first.data(),
                            second.data(),
                            partner.data(),
                            alpha.data(),
                            beta.data(),
                            loss.data(),
                            grad_x.data(),
                            grad_y.data(),
                            grad_scale.data(),
                            kRows,
                            kWidth,
                            kHard,
                            kMix,
                            kQueryMix};
  run_grid(blocks, args.floats().bytes(), [&](const Block& block) { MixingKernel(block, args).run(); });

  auto exact = [&](double step, double at) {
    const Rows q = unit_rows(x, along_x, step, kWidth), p = unit_rows(y, along_y, step, kWidth);
    double total = 0;
    for (int row = 0; row < kRows; row++) total += mochi_loss(q[row], p[row], queue, synthetic[row], at);
    return total;
  };
  const double step = 1e-4, wanted = exact(0, scale);
  const double by_scale = (exact(0, scale + step) - exact(0, scale - step)) / (2 * step);
  const double by_input = (exact(step, scale) - exact(-step, scale)) / (2 * step);
  double got_by_input = 0;
  for (size_t i = 0; i < x.size(); i++) got_by_input += grad_x[i] * along_x[i] + grad_y[i] * along_y[i];
  const double got = std::accumulate(loss.begin(), loss.end(), 0.0),
               got_by_scale = std::accumulate(grad_scale.begin(), grad_scale.end(), 0.0);
  auto near = [&](double a, double b) { return std::abs(a - b) <= tolerance; };
  const bool right = near(got, wanted) && near(got_by_scale, by_scale) && near(got_by_input, by_input);
  std::printf("%s MoCHi on %d blocks: loss %.6f (%.6f), by scale %.6f (%.6f), by input %.6f (%.6f)\n",
              right ? "ok  " : "FAIL", blocks, got, wanted, got_by_scale, by_scale, got_by_input, by_input);
  return right;
}

bool check_enqueue(int size, int count, int width, int blocks) {
  const std::vector<float> rows = random_rows<float>(count, width, 5);
  std::vector<float> keys(size * width, 0);
  std::vector<int64_t> row_ids(count), ids(size, -1);
  std::iota(row_ids.begin(), row_ids.end(), 0);
  int64_t pointer = size - 2;
  const Enqueue<float, float> args{rows.data(), width, row_ids.data(), keys.data(), ids.data(),
                                   &pointer,    size,  count,          width};
  run_grid(blocks, 0, [&](const Block& block) { enqueue_rows(block, args); });
  const Rows unit = unit_rows(rows, rows, 0, width);
  bool right = pointer == (size - 2 + count) % size;
  for (int i = std::max(0, count - size); i < count; i++) {
    const int slot = (size - 2 + i) % size;
    right &= ids[slot] == i;
    for (int d = 0; d < width; d++) right &= std::abs(keys[slot * width + d] - unit[i][d]) < 1e-6;
  }
  std::printf("%s enqueue %d of %d on %d blocks\n", right ? "ok  " : "FAIL", count, size, blocks);
  return right;
}

}  // namespace
}  // namespace fastcl::cuda

int main() {
  using namespace fastcl;
  using namespace fastcl::cuda;
  bool right = true;
  // the last has no room for the larger ones in float32
  for (Device device : {Device{1, 1 << 30}, {4, 1 << 30}, {8, 43 << 10}}) {
    for (Layout layout : {Layout::views, Layout::batch, Layout::pairs}) {
      right &= check_one_positive<float>(layout, 48, 33, device, 2e-5);
      right &= check_one_positive<c10::BFloat16>(layout, 65, 130, device, 1e-3);
      right &= check_one_positive<c10::Half>(layout, 3, 5, device, 1e-3);
    }
    for (bool log_of_mean : {false, true}) {
      right &= check_sup_con<float>(70, {}, log_of_mean, 33, device, 2e-5);
      right &= check_sup_con<c10::BFloat16>(65, 130, log_of_mean, 130, device, 1e-3);
      right &= check_sup_con<c10::Half>(12, {}, log_of_mean, 5, device, 2e-3);
    }
  }
  for (int blocks : {1, 3}) {
    right &= check_mixing<float, float>(blocks, 1e-4);
    right &= check_mixing<c10::BFloat16, c10::Half>(blocks, 1e-4);
  }
  for (int count : {0, 5, 40}) right &= check_enqueue(11, count, 7, 3);
  return right ? 0 : 1;
}
