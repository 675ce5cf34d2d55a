#include "ggro/score_select.h"

#include <cmath>
#include <memory>

#include "dot.h"
#include "dtypes.h"
#include "ggro/errors.h"
#include "kernels.h"
#include "threads.h"

// Floor: one read of the hidden states, a multiply-add each. Selection adds one exponential a candidate where it
// samples.
namespace ggro::cpu {
namespace {

// Multiply-adds.
constexpr int64_t kMinWorkPerThread = 1 << 16;

template <typename T>
void rewards(const ScoreSelectArgs& args, const float* head) {
  const int64_t pairs = args.rows * args.candidates;
  const int threads = thread_count(args.num_threads, pairs, pairs * args.width, kMinWorkPerThread);
  const T* hidden = static_cast<const T*>(args.hidden);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
  for (int64_t i = 0; i < pairs; ++i) {
    const T* state =
        hidden + i / args.candidates * args.hidden_row_stride + i % args.candidates * args.hidden_candidate_stride;
    args.reward[i] = dot(head, state, args.width);
  }
}

int64_t first_largest(const float* score, int64_t candidates) {
  int64_t best = 0;
  for (int64_t j = 1; j < candidates && !std::isnan(score[best]); ++j) {
    if (score[j] > score[best] || std::isnan(score[j])) best = j;
  }
  return best;
}

// cumulative: [candidates], scratch.
int64_t select(const ScoreSelectArgs& args, int64_t row, double* cumulative) {
  const float* score = args.score + row * args.candidates;
  const int64_t best = first_largest(score, args.candidates);
  if (args.uniforms == nullptr || !std::isfinite(score[best])) return best;
  double total = 0.0;
  for (int64_t j = 0; j < args.candidates; ++j) {
    total += std::exp((static_cast<double>(score[j]) - score[best]) / args.temperature);
    cumulative[j] = total;
  }
  const double threshold = args.uniforms[row] * total;
  int64_t index = 0;
  while (!(cumulative[index] > threshold)) ++index;
  return index;
}

void run(const ScoreSelectArgs& args) {
  const std::unique_ptr<float[]> head(new float[args.width]);
  for (int64_t i = 0; i < args.width; ++i) head[i] = to_float(args.head, args.head_dtype, i);
  with_dtype(args.hidden_dtype, [&](auto type) { rewards<decltype(type)>(args, head.get()); });
  const std::unique_ptr<double[]> cumulative(new double[args.candidates]);
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t i = row * args.candidates; i < (row + 1) * args.candidates; ++i) {
      const float logit = to_float(args.logits, args.logits_dtype, i);
      // Padding stays out of reach whatever its reward, which may be NaN.
      const bool padding = logit == -kInfinity;
      args.score[i] = padding ? logit : logit + args.weight * args.reward[i];
    }
    args.index[row] = select(args, row, cumulative.get());
  }
}

}  // namespace

namespace GGRO_ISA {

void score_select(const ScoreSelectArgs& args) {
  for (int64_t row = 0; args.uniforms != nullptr && row < args.rows; ++row) {
    const float uniform = args.uniforms[row];
    if (!(uniform >= 0.0f && uniform < 1.0f)) throw_not_in_unit_interval("uniforms", row, uniform);
  }
  run(args);
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
