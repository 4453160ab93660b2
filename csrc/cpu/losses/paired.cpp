#include "cpu/losses/paired.h"

#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

namespace fastcl::cpu {

namespace {

// A query's loss, and what its gradients are made of.
template <class T>
class PairedLoss {
 public:
  PairedLoss(const OnePositive& args, const OnePositiveResult<T>& result)
      : args_(args),
        result_(result),
        query_(unit_rows<T>({args.query}, args.normalize)),
        positive_(unit_rows<T>({args.positive}, args.normalize)),
        negatives_(unit_rows<T>({args.negatives}, args.normalize_negatives)),
        rows_(query_.count),
        keys_(rows_ ? negatives_.count / rows_ : 0),
        incoming_(args.mean ? T(1) / rows_ : T(1)),
        losses_(allocate<T>(rows_)),
        pull_(allocate<T>(rows_)),
        weights_(allocate<T>(negatives_.count)) {}

  void run() {
    const int64_t grain = std::max<int64_t>(1, kRowGrain / std::max<int64_t>(keys_, 1));
    for_each_range(rows_, grain, [&](int64_t begin, int64_t end, Scratch&) {
      for (int64_t i = begin; i < end; i++) weigh(i);
    });
    const double total = std::accumulate(losses_.get(), losses_.get() + rows_, 0.0);
    *result_.loss = static_cast<T>(args_.mean ? total / rows_ : total);
    if (result_.query || result_.scale) write_query();
    const T scale = static_cast<T>(args_.scale);
    const Kernels<T>& k = kernels<T>();
    if (result_.positive) {
      auto pulled = [&](int64_t i, T* sum) { k.add_scaled(sum, query_.row(i), -pull_[i], query_.stride); };
      write_gradients<T>(positive_, scale, pulled, rows_of(result_.positive, query_.width), nullptr);
    }
    if (result_.negatives) {
      auto pushed = [&](int64_t n, T* sum) {
        k.add_scaled(sum, query_.row(n / keys_), weights_[n], query_.stride);
      };
      write_gradients<T>(negatives_, scale, pushed, rows_of(result_.negatives, query_.width), nullptr);
    }
  }

 private:
  // The loss of query i, and the gradients of its logits: of each negative's, and minus that of the
  // positive's.
  void weigh(int64_t i) {
    const Kernels<T>& k = kernels<T>();
    const T scale = static_cast<T>(args_.scale);
    T* weights = weights_.get() + i * keys_;
    T max = -INFINITY;
    for (int64_t j = 0; j < keys_; j++) {
      weights[j] = scale * k.dot(query_.row(i), negatives_.row(i * keys_ + j), query_.stride);
      if (std::isnan(weights[j]) || weights[j] > max) max = weights[j];
      if (std::isnan(max)) break;
    }
    const T positive = scale * k.dot(query_.row(i), positive_.row(i), query_.stride);
    for (int64_t j = 0; j < keys_; j++) weights[j] = std::exp(weights[j] - max);
    const T sum = static_cast<T>(std::accumulate(weights, weights + keys_, 0.0));
    const SoftPlus<T> loss = loss_of_row<T>(args_, keys_ ? max - positive + std::log(sum) : -T(INFINITY));
    losses_[i] = loss.value;
    pull_[i] = loss.slope * incoming_;
    for (int64_t j = 0; j < keys_; j++) weights[j] *= pull_[i] / sum;
  }

  void write_query() {
    const Kernels<T>& k = kernels<T>();
    const Buffer<T> radial = allocate<T>(rows_);
    auto sum_of_row = [&](int64_t i, T* sum) {
      std::vector<T> block(query_.stride);
      for (int64_t first = 0; first < keys_; first += kBlock) {
        std::fill(block.begin(), block.end(), T(0));
        for (int64_t n = i * keys_ + first; n < i * keys_ + std::min(first + kBlock, keys_); n++)
          k.add_scaled(block.data(), negatives_.row(n), weights_[n], query_.stride);
        k.add_scaled(sum, block.data(), T(1), query_.stride);
      }
      k.add_scaled(sum, positive_.row(i), -pull_[i], query_.stride);
    };
    write_gradients(query_, static_cast<T>(args_.scale), sum_of_row, rows_of(result_.query, query_.width),
                    radial.get());
    if (result_.scale) *result_.scale = std::accumulate(radial.get(), radial.get() + rows_, 0.0);
  }

  static constexpr int64_t kBlock = 64;  // negatives whose sum is one chain of additions

  const OnePositive& args_;
  const OnePositiveResult<T>& result_;
  UnitRows<T> query_, positive_, negatives_;
  int64_t rows_, keys_;
  T incoming_;
  Buffer<T> losses_, pull_;
  Buffer<T> weights_;  // [rows, keys]
};

}  // namespace

template <class T>
void paired(const OnePositive& args, const OnePositiveResult<T>& result) {
  PairedLoss<T>(args, result).run();
}

template void paired<float>(const OnePositive&, const OnePositiveResult<float>&);
template void paired<double>(const OnePositive&, const OnePositiveResult<double>&);

}  // namespace fastcl::cpu
