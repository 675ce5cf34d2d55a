#include "ggro/entropy_topk_backward.h"

#include <algorithm>
#include <cmath>

#include "dtypes.h"
#include "kernels.h"
#include "narrow.h"
#include "simd.h"
#include "threads.h"

// Floor: one read of the logits and one write of their gradient, and one exponential each, whichever takes longer.
// Where the gradients of a row's entropy and logsumexp are zero only the write remains.
namespace ggro::cpu {
namespace {

constexpr int64_t kBlock = 4096;

constexpr int64_t kMinBlocksPerThread = 8;

// What the gradients of a row have in common.
struct Row {
  float inverse_temperature;
  float logsumexp;
  float entropy;
  float entropy_slope;    // gradient of the entropy / temperature
  float logsumexp_slope;  // gradient of the logsumexp / temperature

  bool zero() const { return entropy_slope == 0.0f && logsumexp_slope == 0.0f; }

  bool finite() const {
    return std::isfinite(logsumexp) && std::isfinite(entropy) && std::isfinite(entropy_slope) &&
           std::isfinite(logsumexp_slope);
  }
};

inline float gradient_of(const Row& row, float logit) {
  const float log_probability = logit * row.inverse_temperature - row.logsumexp;
  if (row.zero() || logit == -kInfinity || log_probability == -kInfinity) return 0.0f;
  // An entropy of NaN matters only where its gradient is used.
  const float entropy_term = row.entropy_slope == 0.0f ? 0.0f : row.entropy_slope * (log_probability + row.entropy);
  return std::exp(log_probability) * (row.logsumexp_slope - entropy_term);
}

template <typename T>
void vector_gradients(const Row& row, const T* x, T* out) {
  const Vec floor = broadcast(kExp2Floor / kLog2E<float>);
  // The floor keeps a probability of zero from multiplying an infinity.
  const Vec log_probability = max(floor, fma(load(x), broadcast(row.inverse_temperature), broadcast(-row.logsumexp)));
  const Vec probability = exp2_nonpositive(mul(log_probability, broadcast(kLog2E<float>)));
  const Vec slope =
      fma(broadcast(-row.entropy_slope), add(log_probability, broadcast(row.entropy)), broadcast(row.logsumexp_slope));
  store(out, mul(probability, slope));
}

template <typename T>
void block_gradients(const Row& row, const T* x, int64_t columns, T* out) {
  if (row.zero()) {
    std::fill(out, out + columns, from_float<T>(0.0f));
    return;
  }
  int64_t i = 0;
  if (row.finite()) {
    for (; i + kLanes <= columns; i += kLanes) vector_gradients(row, x + i, out + i);
  }
  for (; i < columns; ++i) out[i] = from_float<T>(gradient_of(row, to_float(x[i])));
}

template <typename T>
void run(const EntropyTopKBackwardArgs& args) {
  const int64_t blocks = (args.vocab + kBlock - 1) / kBlock;
  const int64_t units = args.rows * blocks;
  const int threads = thread_count(args.num_threads, units, units, kMinBlocksPerThread);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t r = unit / blocks;
    const int64_t first = unit % blocks * kBlock;
    const int64_t last = std::min(first + kBlock, args.vocab);
    const float inverse_temperature = 1.0f / args.temperature;
    const Row row = {inverse_temperature, args.logsumexp[r], args.entropy[r],
                     args.entropy_gradient[r] * inverse_temperature, args.logsumexp_gradient[r] * inverse_temperature};
    const T* x = static_cast<const T*>(args.logits) + r * args.row_stride;
    T* out = static_cast<T*>(args.gradient) + r * args.vocab;
    block_gradients(row, x + first, last - first, out + first);
    for (int64_t j = r * args.k; j < (r + 1) * args.k; ++j) {
      const int64_t column = args.indices[j];
      if (column < first || column >= last) continue;
      // Summed before it is rounded to the dtype.
      const float value = to_float(static_cast<const T*>(args.values_gradient)[j]);
      out[column] = from_float<T>(gradient_of(row, to_float(x[column])) + value);
    }
  }
}

}  // namespace

namespace GGRO_ISA {

void entropy_topk_backward(const EntropyTopKBackwardArgs& args) {
  with_dtype(args.dtype, [&](auto type) { run<decltype(type)>(args); });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
