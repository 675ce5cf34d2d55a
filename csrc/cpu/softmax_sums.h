#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "simd.h"

// Sums of a softmax over a row, block by block: s = sum e^(x-m) and t = sum (x-m) e^(x-m) with m the block's maximum.
// In an unnamed namespace for the reason given in simd.h.
namespace ggro::cpu {
namespace {

constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes;

// Sums of one block, shifted by its maximum, which ignores NaN. A NaN in the block makes `sum` NaN.
struct BlockSums {
  float max;
  float sum;
  float weighted;
};

// Folds blocks, in order, into the sums of a row.
class RowSums {
 public:
  explicit RowSums(double inverse_temperature) : inverse_temperature_(inverse_temperature) {}

  void fold(const BlockSums& block) {
    const double weighted = inverse_temperature_ * block.weighted;
    if (block.max <= max_) {
      // Both infinite: their difference would be NaN. The sum still has to carry a NaN.
      if (std::isinf(block.max)) {
        sum_ += block.sum;
        return;
      }
      const double shift = inverse_temperature_ * (static_cast<double>(block.max) - max_);
      const double scale = std::exp(shift);
      sum_ += scale * block.sum;
      weighted_ += scale * (weighted + shift * block.sum);
    } else {
      const double shift = inverse_temperature_ * (static_cast<double>(max_) - block.max);
      // Nothing but -inf came before: shift is -inf, and 0 * -inf would be NaN. A NaN that came before stays.
      const double scale = max_ == -kInfinity ? 0.0 : std::exp(shift);
      weighted_ = weighted + (scale == 0.0 ? 0.0 : scale * (weighted_ + shift * sum_));
      sum_ = block.sum + scale * sum_;
      max_ = block.max;
    }
  }

  float logsumexp() const {
    if (std::isnan(sum_)) return kNaN;
    if (std::isinf(max_)) return max_;
    return static_cast<float>(inverse_temperature_ * max_ + std::log(sum_));
  }

  float entropy() const {
    if (std::isnan(sum_) || std::isinf(max_)) return kNaN;
    return static_cast<float>(std::log(sum_) - weighted_ / sum_);
  }

 private:
  double inverse_temperature_;
  float max_ = -kInfinity;
  double sum_ = 0.0;
  double weighted_ = 0.0;
};

inline Vec reduce_sum(const Vec* accumulators) {
  return add(add(accumulators[0], accumulators[1]), add(accumulators[2], accumulators[3]));
}

inline bool any_nan(const float* x, int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) {
    if (x[i] != x[i]) return true;
  }
  return false;
}

// Sums of the fp32 columns x, padded with -inf to a multiple of kStep, whose maximum is `largest`.
// scale: log2(e) / temperature. step(): called for every kStep columns, to interleave other work with the arithmetic.
template <typename Step>
inline BlockSums block_sums(const float* x, int64_t padded, float largest, float scale, Step step) {
  if (std::isinf(largest)) {
    const bool nan = any_nan(x, padded);
    return {largest, nan ? kNaN : (largest > 0.0f ? 1.0f : 0.0f), 0.0f};
  }
  const Vec shift = broadcast(largest);
  const Vec scales = broadcast(scale);
  // Keeps (x - m) e^(x-m) finite for x = -inf; the power of two is zero there.
  const Vec floor = broadcast(std::max(kExp2Floor / scale, -FLT_MAX));
  Vec sums[kUnroll];
  Vec weighted[kUnroll];
  for (int u = 0; u < kUnroll; ++u) sums[u] = weighted[u] = broadcast(0.0f);
  for (int64_t i = 0; i < padded; i += kStep) {
    step();
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const Vec difference = max(floor, sub(load(x + i + u * kLanes), shift));
      const Vec power = exp2_nonpositive(mul(difference, scales));
      sums[u] = add(sums[u], power);
      weighted[u] = fma(difference, power, weighted[u]);
    }
  }
  return {largest, horizontal_sum(reduce_sum(sums)), horizontal_sum(reduce_sum(weighted))};
}

}  // namespace
}  // namespace ggro::cpu
