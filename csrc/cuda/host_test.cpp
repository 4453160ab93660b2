// The kernels on the host against dense float64 loops, as a program of its own for the thread and address
// sanitizers, which a whole torch does not survive.
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/enqueue.cuh"
#include "cuda/one_launch.cuh"

namespace fastcl {
namespace {

using Matrix = std::vector<std::vector<double>>;

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
Matrix unit_rows(const std::vector<T>& values, const std::vector<float>& direction, double step,
                 int64_t width) {
  Matrix rows(values.size() / width, std::vector<double>(width));
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
double mean_loss(const Matrix& x, const Matrix& y, double scale, bool own_side) {
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

double exact_loss(Layout layout, const Matrix& x, const Matrix& y, double scale) {
  const bool views = layout == Layout::views;
  const double forth = mean_loss(x, y, scale, views);
  return layout == Layout::batch ? forth : (forth + mean_loss(y, x, scale, views)) / 2;
}

// Of the loss, and of its derivatives by the scale and along a random direction of both inputs.
template <class T>
bool check(Layout layout, int64_t samples, int64_t width, int blocks, double tolerance) {
  const std::vector<T> x = random_rows<T>(samples, width, 1), y = random_rows<T>(samples, width, 2);
  const float scale = 5;
  float loss, scale_gradient;
  std::vector<float> query(x.size(), NAN), positive(y.size(), NAN);
  const Plan plan = make_plan(layout, samples, 0, width, {blocks, int64_t(1) << 30}).value();
  const Work work(plan, true);
  std::vector<float> memory(work.total, NAN);
  const OneLaunch<T> args{{{x.data(), width, true}, {y.data(), width, true}, {}},
                          nullptr,
                          nullptr,
                          &scale,
                          layout,
                          true,
                          false,
                          &loss,
                          {query.data(), positive.data(), nullptr},
                          &scale_gradient,
                          plan,
                          work,
                          memory.data()};
  run_grid(plan.blocks, plan.shared_bytes(), [&](const Block& block) { OneLaunchKernel(block, args).run(); });

  const std::vector<float> along_x = random_rows<float>(samples, width, 3),
                           along_y = random_rows<float>(samples, width, 4);
  auto exact = [&](double step, double at) {
    return exact_loss(layout, unit_rows(x, along_x, step, width), unit_rows(y, along_y, step, width), at);
  };
  auto near = [&](double got, double wanted) { return std::abs(got - wanted) <= tolerance; };
  const double step = 1e-4, value = exact(0, scale);
  const double by_scale = (exact(0, scale + step) - exact(0, scale - step)) / (2 * step);
  const double by_input = (exact(step, scale) - exact(-step, scale)) / (2 * step);
  double got_by_input = 0;
  for (size_t i = 0; i < x.size(); i++) got_by_input += query[i] * along_x[i] + positive[i] * along_y[i];
  const bool right = near(loss, value) && near(scale_gradient, by_scale) && near(got_by_input, by_input);
  std::printf(
      "%s layout %d, %ld x %ld on %d blocks: loss %.6f (%.6f), by scale %.6f (%.6f), by input %.6f (%.6f)\n",
      right ? "ok  " : "FAIL", int(layout), long(samples), long(width), plan.blocks, loss, value,
      scale_gradient, by_scale, got_by_input, by_input);
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
  const Matrix unit = unit_rows(rows, rows, 0, width);
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
}  // namespace fastcl

int main() {
  using namespace fastcl;
  bool right = true;
  for (Layout layout : {Layout::views, Layout::batch, Layout::pairs})
    for (int blocks : {1, 4}) {
      right &= check<float>(layout, 70, 33, blocks, 2e-5);
      right &= check<c10::BFloat16>(layout, 65, 130, blocks, 1e-3);
      right &= check<c10::Half>(layout, 3, 5, blocks, 1e-3);
    }
  for (int count : {0, 5, 40}) right &= check_enqueue(11, count, 7, 3);
  return right ? 0 : 1;
}
