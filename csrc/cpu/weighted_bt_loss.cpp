#include "ggro/weighted_bt_loss.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "dtypes.h"
#include "ggro/errors.h"
#include "kernels.h"
#include "narrow.h"
#include "threads.h"

// Floor: for each pair one read of its weight and, where that is not zero, of its positions and the two rewards they
// name, anywhere in their rows, and one exponential. The backward pass also writes both gradients once.
namespace ggro::cpu {
namespace {

constexpr int64_t kMinPairsPerThread = 4096;

// The pairs of rewards of type R with weights of type W.
template <typename R, typename W>
class Pairs {
 public:
  explicit Pairs(const WeightedBTLossArgs& args) : args_(args) {}

  double weight(int64_t pair) const { return to_float(static_cast<const W*>(args_.weights)[pair]); }

  double margin(int64_t row, int64_t pair) const {
    const R* chosen = static_cast<const R*>(args_.chosen_rewards) + row * args_.chosen_stride;
    const R* rejected = static_cast<const R*>(args_.rejected_rewards) + row * args_.rejected_stride;
    return static_cast<double>(to_float(chosen[args_.chosen_positions[pair]])) -
           to_float(rejected[args_.rejected_positions[pair]]);
  }

  // What every pair is multiplied by, after a check of all positions.
  double scale() const {
    int64_t count = 0;
    for (int64_t i = 0; i < args_.rows * args_.pairs; ++i) {
      if (weight(i) == 0.0) continue;
      ++count;
      check("chosen_positions", i, args_.chosen_positions[i], args_.chosen_length, "the positions of chosen_rewards");
      check("rejected_positions", i, args_.rejected_positions[i], args_.rejected_length,
            "the positions of rejected_rewards");
    }
    return args_.mean && count > 0 ? 1.0 / static_cast<double>(count) : 1.0;
  }

  double row_loss(int64_t row) const {
    double sum = 0.0;
    for (int64_t i = row * args_.pairs; i < (row + 1) * args_.pairs; ++i) {
      if (weight(i) != 0.0) sum += weight(i) * minus_log_sigmoid(margin(row, i));
    }
    return sum;
  }

  // chosen, rejected: scratch of their lengths.
  void row_gradients(int64_t row, double scale, double* chosen, double* rejected) const {
    std::fill(chosen, chosen + args_.chosen_length, 0.0);
    std::fill(rejected, rejected + args_.rejected_length, 0.0);
    for (int64_t i = row * args_.pairs; i < (row + 1) * args_.pairs; ++i) {
      if (weight(i) == 0.0) continue;
      const double slope = scale * weight(i) / (1.0 + std::exp(margin(row, i)));
      chosen[args_.chosen_positions[i]] -= slope;
      rejected[args_.rejected_positions[i]] += slope;
    }
    write(chosen, args_.chosen_length, static_cast<R*>(args_.chosen_gradient) + row * args_.chosen_length);
    write(rejected, args_.rejected_length, static_cast<R*>(args_.rejected_gradient) + row * args_.rejected_length);
  }

 private:
  static double minus_log_sigmoid(double x) {
    const double softplus = log1p_of_unit(std::exp(-std::fabs(x)));
    return x < 0.0 ? softplus - x : softplus;
  }

  // log(1 + x) for 0 <= x <= 1 or NaN as the series of 2 atanh(x / (2 + x)), relative error below 1e-11. std::log1p
  // takes most of the op's time.
  static double log1p_of_unit(double x) {
    const double ratio = x / (2.0 + x);
    const double square = ratio * ratio;
    double series = 1.0 / 19.0;
    for (int odd = 17; odd > 0; odd -= 2) series = series * square + 1.0 / odd;
    return 2.0 * ratio * series;
  }

  static void write(const double* gradient, int64_t length, R* out) {
    for (int64_t i = 0; i < length; ++i) out[i] = from_float<R>(static_cast<float>(gradient[i]));
  }

  void check(const char* name, int64_t pair, int64_t position, int64_t length, const char* meaning) const {
    if (position >= 0 && position < length) return;
    throw_out_of_range(name, pair / args_.pairs, pair % args_.pairs, position, length - 1, meaning);
  }

  const WeightedBTLossArgs& args_;
};

int threads_for(const WeightedBTLossArgs& args) {
  return thread_count(args.num_threads, args.rows, args.rows * args.pairs, kMinPairsPerThread);
}

template <typename R, typename W>
void run_forward(const WeightedBTLossArgs& args) {
  const Pairs<R, W> pairs(args);
  const double scale = pairs.scale();
  const std::unique_ptr<double[]> losses(new double[args.rows]);
  const int threads = threads_for(args);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
  for (int64_t row = 0; row < args.rows; ++row) losses[row] = pairs.row_loss(row);
  double sum = 0.0;
  for (int64_t row = 0; row < args.rows; ++row) sum += losses[row];
  *args.loss = static_cast<float>(scale * sum);
}

template <typename R, typename W>
void run_backward(const WeightedBTLossArgs& args) {
  const Pairs<R, W> pairs(args);
  const double scale = pairs.scale() * *args.loss_gradient;
  const int threads = threads_for(args);
  const int64_t length = args.chosen_length + args.rejected_length;
  const std::unique_ptr<double[]> gradients(new double[threads * length]);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
  for (int thread = 0; thread < threads; ++thread) {
    double* chosen = gradients.get() + thread * length;
    for (int64_t row = args.rows * thread / threads; row < args.rows * (thread + 1) / threads; ++row) {
      pairs.row_gradients(row, scale, chosen, chosen + args.chosen_length);
    }
  }
}

}  // namespace

namespace GGRO_ISA {

void weighted_bt_loss(const WeightedBTLossArgs& args) {
  with_dtypes(args.dtype, args.weights_dtype,
              [&](auto reward, auto weight) { run_forward<decltype(reward), decltype(weight)>(args); });
}

void weighted_bt_loss_backward(const WeightedBTLossArgs& args) {
  with_dtypes(args.dtype, args.weights_dtype,
              [&](auto reward, auto weight) { run_backward<decltype(reward), decltype(weight)>(args); });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
