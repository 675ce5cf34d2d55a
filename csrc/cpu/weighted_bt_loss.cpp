#include "ggro/weighted_bt_loss.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "dtypes.h"
#include "ggro/errors.h"
#include "kernels.h"
#include "narrow.h"
#include "threads.h"

namespace ggro::cpu {
namespace {

constexpr int64_t kMinPairsPerThread = 4096;

double weight_of(const WeightedBTLossArgs& args, int64_t pair) {
  return to_float(args.weights, args.weights_dtype, pair);
}

int threads_for(const WeightedBTLossArgs& args) {
  return thread_count(args.num_threads, args.rows, args.rows * args.pairs, kMinPairsPerThread);
}

// What every pair is multiplied by, after a check of all positions.
double scale_of(const WeightedBTLossArgs& args) {
  int64_t count = 0;
  for (int64_t i = 0; i < args.rows * args.pairs; ++i) {
    if (weight_of(args, i) == 0.0) continue;
    ++count;
    const int64_t chosen = args.chosen_positions[i];
    if (chosen < 0 || chosen >= args.chosen_length) {
      throw_out_of_range("chosen_positions", i / args.pairs, i % args.pairs, chosen, args.chosen_length - 1,
                         "the positions of chosen_rewards");
    }
    const int64_t rejected = args.rejected_positions[i];
    if (rejected < 0 || rejected >= args.rejected_length) {
      throw_out_of_range("rejected_positions", i / args.pairs, i % args.pairs, rejected, args.rejected_length - 1,
                         "the positions of rejected_rewards");
    }
  }
  return args.mean && count > 0 ? 1.0 / static_cast<double>(count) : 1.0;
}

double margin_of(const WeightedBTLossArgs& args, int64_t row, int64_t pair) {
  const int64_t chosen = row * args.chosen_stride + args.chosen_positions[pair];
  const int64_t rejected = row * args.rejected_stride + args.rejected_positions[pair];
  return static_cast<double>(to_float(args.chosen_rewards, args.dtype, chosen)) -
         to_float(args.rejected_rewards, args.dtype, rejected);
}

double minus_log_sigmoid(double x) {
  const double softplus = std::log1p(std::exp(-std::fabs(x)));
  return x < 0.0 ? softplus - x : softplus;
}

double row_loss(const WeightedBTLossArgs& args, int64_t row) {
  double sum = 0.0;
  for (int64_t i = row * args.pairs; i < (row + 1) * args.pairs; ++i) {
    const double weight = weight_of(args, i);
    if (weight != 0.0) sum += weight * minus_log_sigmoid(margin_of(args, row, i));
  }
  return sum;
}

template <typename T>
void write(const double* gradient, int64_t length, T* out) {
  for (int64_t i = 0; i < length; ++i) out[i] = from_float<T>(static_cast<float>(gradient[i]));
}

template <typename T>
void row_gradients(const WeightedBTLossArgs& args, int64_t row, double scale, double* chosen, double* rejected) {
  std::fill(chosen, chosen + args.chosen_length, 0.0);
  std::fill(rejected, rejected + args.rejected_length, 0.0);
  for (int64_t i = row * args.pairs; i < (row + 1) * args.pairs; ++i) {
    const double weight = weight_of(args, i);
    if (weight == 0.0) continue;
    const double slope = scale * weight / (1.0 + std::exp(margin_of(args, row, i)));
    chosen[args.chosen_positions[i]] -= slope;
    rejected[args.rejected_positions[i]] += slope;
  }
  write(chosen, args.chosen_length, static_cast<T*>(args.chosen_gradient) + row * args.chosen_length);
  write(rejected, args.rejected_length, static_cast<T*>(args.rejected_gradient) + row * args.rejected_length);
}

template <typename T>
void run_backward(const WeightedBTLossArgs& args) {
  const double scale = scale_of(args) * *args.loss_gradient;
  const int threads = threads_for(args);
  const int64_t length = args.chosen_length + args.rejected_length;
  const std::unique_ptr<double[]> gradients(new double[threads * length]);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
  for (int thread = 0; thread < threads; ++thread) {
    double* chosen = gradients.get() + thread * length;
    for (int64_t row = args.rows * thread / threads; row < args.rows * (thread + 1) / threads; ++row) {
      row_gradients<T>(args, row, scale, chosen, chosen + args.chosen_length);
    }
  }
}

}  // namespace

namespace GGRO_ISA {

void weighted_bt_loss(const WeightedBTLossArgs& args) {
  const double scale = scale_of(args);
  const std::unique_ptr<double[]> losses(new double[args.rows]);
  const int threads = threads_for(args);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
  for (int64_t row = 0; row < args.rows; ++row) losses[row] = row_loss(args, row);
  double sum = 0.0;
  for (int64_t row = 0; row < args.rows; ++row) sum += losses[row];
  *args.loss = static_cast<float>(scale * sum);
}

void weighted_bt_loss_backward(const WeightedBTLossArgs& args) {
  with_dtype(args.dtype, [&](auto type) { run_backward<decltype(type)>(args); });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
