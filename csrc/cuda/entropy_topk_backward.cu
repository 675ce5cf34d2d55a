#include "dtypes.h"
#include "ggro/cuda.h"
#include "logits.h"

namespace ggro::cuda {
namespace {

// What the gradients of a row have in common.
struct Row {
  float temperature;
  float entropy;
  float logsumexp;
  float entropy_gradient;
  float logsumexp_gradient;

  GGRO_DEVICE Row(const EntropyTopKBackwardArgs& args, int64_t row)
      : temperature(args.temperature),
        entropy(args.entropy[row]),
        logsumexp(args.logsumexp[row]),
        entropy_gradient(args.entropy_gradient[row]),
        logsumexp_gradient(args.logsumexp_gradient[row]) {}

  // The gradient of a logit, without that of its value; 0 where its probability is.
  GGRO_DEVICE float of(float logit) const {
    const float log_probability = logit / temperature - logsumexp;
    if (logit == -INFINITY || log_probability == -INFINITY) return 0.0f;
    if (entropy_gradient == 0.0f && logsumexp_gradient == 0.0f) return 0.0f;
    // An entropy of NaN matters only where its gradient is used.
    const float entropy_term = entropy_gradient == 0.0f ? 0.0f : entropy_gradient * (log_probability + entropy);
    return expf(log_probability) * (logsumexp_gradient - entropy_term) / temperature;
  }
};

// A thread takes 16 bytes of logits.
template <typename T>
struct SoftmaxKernel {
  using Args = EntropyTopKBackwardArgs;
  static constexpr int kThreads = 256;
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kColumns = kThreads * kWidth;

  static GGRO_DEVICE void run(Thread& thread, const Args& args) {
    const int64_t blocks = divide_up(args.vocab, kColumns);
    const int64_t r = thread.block() / blocks;
    const int64_t column = thread.block() % blocks * kColumns + thread.index() * kWidth;
    if (column >= args.vocab) return;
    float x[1][kWidth];
    load_logits(static_cast<const T*>(args.logits) + r * args.row_stride, args.vocab,
                {column, column + kWidth, column, 0}, x);
    const Row row(args, r);
    Vector<T, kWidth> gradient;
    for (int i = 0; i < kWidth; ++i) gradient.data[i] = from_float<T>(row.of(x[0][i]));
    T* out = static_cast<T*>(args.gradient) + r * args.vocab + column;
    if (reinterpret_cast<uintptr_t>(out) % 16 == 0 && column + kWidth <= args.vocab) {
      store_vector(out, gradient);
    } else {
      for (int i = 0; i < kWidth; ++i) {
        if (column + i < args.vocab) out[i] = gradient.data[i];
      }
    }
  }
};

// A thread a value: its logit's gradient once more, since what lies in memory has been rounded.
template <typename T>
struct ValuesKernel {
  using Args = EntropyTopKBackwardArgs;
  static constexpr int kThreads = 128;

  static GGRO_DEVICE void run(Thread& thread, const Args& args) {
    const int64_t i = thread.block() * kThreads + thread.index();
    thread.wait_for_previous_kernel();
    if (i >= args.rows * args.k) return;
    const int64_t r = i / args.k, column = args.indices[i];
    const float logit = to_float(static_cast<const T*>(args.logits)[r * args.row_stride + column]);
    const float value_gradient = to_float(static_cast<const T*>(args.values_gradient)[i]);
    static_cast<T*>(args.gradient)[r * args.vocab + column] = from_float<T>(Row(args, r).of(logit) + value_gradient);
  }
};

}  // namespace

int64_t entropy_topk_backward_workspace(const EntropyTopKBackwardArgs&) { return 0; }

void entropy_topk_backward(const EntropyTopKBackwardArgs& args, void*, const Stream& stream) {
  if (args.rows == 0) return;
  with_dtype(args.dtype, [&](auto element) {
    using Softmax = SoftmaxKernel<decltype(element)>;
    using Values = ValuesKernel<decltype(element)>;
    const int64_t blocks = args.rows * divide_up(args.vocab, Softmax::kColumns);
    launch<Softmax>("entropy_topk_backward: softmax", blocks, 0, args, stream);
    launch<Values>("entropy_topk_backward: values", divide_up(args.rows * args.k, Values::kThreads), 0, args, stream,
                   true);
  });
}

}  // namespace ggro::cuda
