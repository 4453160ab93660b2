// What makes a loss of the similarity matrix: which pairs take part, what is known of a line (a row, or a
// column, of one square), the loss and the weights of a line that all its squares were merged into. One
// overload of each function per loss.
#pragma once

#include "cuda/square.cuh"

namespace fastcl::cuda {
inline namespace FASTCL_BODY {

constexpr float kEmptyMax = -1e37f;  // the largest logit of a line where none takes part

// In log2 units. An excluded pair is no positive.
struct Pair {
  float logit;
  bool positive;
};

// The terms of a line's weights. Those of one set are exp2(logit - max) * factor.
enum Term { kMax, kFactor, kCentre, kPositiveMax, kPositiveFactor, kShift };

template <class Loss>
struct Line {
  float loss, slope;  // minus the gradient of a positive that is not in the matrix
  float terms[Loss::kTerms];

  // Weights are zero.
  FASTCL_TILE Line() : loss(0), slope(0), terms{} {
    terms[kMax] = -kExcluded;
    if constexpr (Loss::kTerms > kPositiveMax) terms[kPositiveMax] = -kExcluded;
  }
};

// The sum of exp2 of logits is sum * exp2(max).
struct LogSum {
  float max, sum;
};

template <class Logit>
FASTCL_TILE LogSum log_sum(const Block& block, int count, const Logit& logit) {
  const float max = block.warp_max(count, kEmptyMax, logit);
  return {max, block.warp_sum(count, [&](int i) { return exp2f(logit(i) - max); })};
}

// Of all squares a line meets; part(slot) is one's.
template <class Part>
FASTCL_TILE LogSum merged_log_sum(int slots, const Part& part) {
  LogSum all{kEmptyMax, 0};
  for (int slot = 0; slot < slots; slot++) all.max = fmaxf(all.max, part(slot).max);
  for (int slot = 0; slot < slots; slot++) all.sum += part(slot).sum * exp2f(part(slot).max - all.max);
  return all;
}

// log(1 + exp(x))
FASTCL_TILE float softplus(float x) { return fmaxf(x, 0) + log1pf(expf(-fabsf(x))); }

// ---- one positive per row: softplus(lse of negatives - positive) ----

FASTCL_TILE bool is_excluded(const OnePositiveLoss& loss, const Matrix& matrix, int query, int key) {
  const int samples = matrix.second_input;
  if (loss.layout == Layout::negatives)
    return loss.query_ids && loss.query_ids[query] == loss.negative_ids[key - matrix.first_key];
  return (query < samples ? query : query - samples) == (key < samples ? key : key - samples);
}

// Calls write(statistic, value).
template <class PairAt, class Write>
FASTCL_TILE void summarize_line(const OnePositiveLoss&, const Block& block, int count, const PairAt& pair,
                                const Write& write) {
  const LogSum negatives = log_sum(block, count, [&](int i) { return pair(i).logit; });
  write(0, negatives.max);
  write(1, negatives.sum);
}

// statistic(which, slot) is what summarize_line wrote; `positive` the logit of the line's positive.
template <class Statistic>
FASTCL_TILE Line<OnePositiveLoss> merged_line(const OnePositiveLoss& loss, int slots,
                                              const Statistic& statistic, float positive) {
  Line<OnePositiveLoss> line;
  const LogSum negatives =
      merged_log_sum(slots, [&](int slot) { return LogSum{statistic(0, slot), statistic(1, slot)}; });
  if (negatives.sum == 0) return line;
  const float weight = loss.layout == Layout::pairs ? 0.5f : 1.0f;
  const float excess = (negatives.max - positive + log2f(negatives.sum)) * kLn2;
  line.loss = weight * softplus(excess);
  line.slope = weight / (1 + expf(-excess));
  line.terms[kMax] = negatives.max;
  line.terms[kFactor] = line.slope / negatives.sum;
  line.terms[kCentre] = positive;
  return line;
}

// term(which) is the line's.
template <class TermAt>
FASTCL_TILE float weight_of(const OnePositiveLoss&, Pair pair, const TermAt& term) {
  return exp2f(pair.logit - term(kMax)) * term(kFactor);
}
template <class TermAt>
FASTCL_TILE float largest_weight(const OnePositiveLoss&, const TermAt& term) {
  return term(kFactor);
}

// ---- SupCon: all of a row's class are its positives, only the row itself takes no part ----

FASTCL_TILE bool is_excluded(const SupConLoss&, const Matrix& matrix, int query, int key) {
  return query == key - matrix.first_key;
}

template <class PairAt, class Write>
FASTCL_TILE void summarize_line(const SupConLoss&, const Block& block, int count, const PairAt& pair,
                                const Write& write) {
  auto logits = [&](bool positive) {
    return log_sum(block, count, [&, positive](int i) {
      const Pair at = pair(i);
      return at.positive == positive ? at.logit : kExcluded;
    });
  };
  const LogSum negatives = logits(false), positives = logits(true);
  auto sum_of_positives = [&](auto value) {
    return block.warp_sum(count, [&](int i) {
      const Pair at = pair(i);
      return at.positive ? value(at) : 0.0f;
    });
  };
  write(0, negatives.max);
  write(1, negatives.sum);
  write(2, positives.max);
  write(3, positives.sum);
  write(4, sum_of_positives([](Pair at) { return at.logit; }));
  write(5, sum_of_positives([](Pair) { return 1.0f; }));
}

template <class Statistic>
FASTCL_TILE Line<SupConLoss> merged_line(const SupConLoss& loss, int slots, const Statistic& statistic,
                                         float) {
  Line<SupConLoss> line;
  auto log_sum_of = [&](int which) {
    return merged_log_sum(
        slots, [&](int slot) { return LogSum{statistic(which, slot), statistic(which + 1, slot)}; });
  };
  float total = 0, count = 0;
  for (int slot = 0; slot < slots; slot++) total += statistic(4, slot), count += statistic(5, slot);
  if (count == 0) return line;
  const LogSum negatives = log_sum_of(0), positives = log_sum_of(2);
  const float mean = total / count;
  line.terms[kCentre] = mean;
  if (loss.log_of_mean) {
    const float excess = (negatives.max - positives.max + log2f(negatives.sum / positives.sum)) * kLn2;
    const float slope = 1 / (1 + expf(-excess));
    line.loss = softplus(excess) + logf(count);
    line.terms[kMax] = negatives.max;
    line.terms[kFactor] = negatives.sum == 0 ? 0 : slope / negatives.sum;
    line.terms[kPositiveMax] = positives.max;
    line.terms[kPositiveFactor] = -slope / positives.sum;
    return line;
  }
  const float max = fmaxf(negatives.max, positives.max);
  const float sum = negatives.sum * exp2f(negatives.max - max) + positives.sum * exp2f(positives.max - max);
  line.loss = (max - mean + log2f(sum)) * kLn2;
  line.terms[kMax] = line.terms[kPositiveMax] = max;
  line.terms[kFactor] = line.terms[kPositiveFactor] = 1 / sum;
  line.terms[kShift] = -1 / count;
  return line;
}

template <class TermAt>
FASTCL_TILE float weight_of(const SupConLoss&, Pair pair, const TermAt& term) {
  return pair.positive ? exp2f(pair.logit - term(kPositiveMax)) * term(kPositiveFactor) + term(kShift)
                       : exp2f(pair.logit - term(kMax)) * term(kFactor);
}
template <class TermAt>
FASTCL_TILE float largest_weight(const SupConLoss&, const TermAt& term) {
  return fmaxf(term(kFactor), fmaxf(fabsf(term(kPositiveFactor)), fabsf(term(kShift))));
}

}  // namespace FASTCL_BODY
}  // namespace fastcl::cuda
