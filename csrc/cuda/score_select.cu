#include "dot.h"
#include "dtypes.h"
#include "ggro/cuda.h"
#include "selection.h"

namespace ggro::cuda {
namespace {

GGRO_DEVICE float element(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  if (dtype == DType::kBFloat16) return to_float(static_cast<const BFloat16*>(data)[i]);
  return to_float(static_cast<const Float16*>(data)[i]);
}

// A block a row: its warps share the candidates, then the first chooses.
template <typename X, typename H>
struct Kernel {
  using Args = ScoreSelectArgs;
  static constexpr int kThreads = 512;

  static GGRO_DEVICE void run(Thread& thread, const Args& args) {
    const int64_t row = thread.block();
    float* scores = args.score + row * args.candidates;
    for (int64_t j = thread.warp(); j < args.candidates; j += kThreads / 32) {
      const X* hidden =
          static_cast<const X*>(args.hidden) + row * args.hidden_row_stride + j * args.hidden_candidate_stride;
      const float reward = warp_dot(thread, hidden, static_cast<const H*>(args.head), args.width);
      if (thread.lane() == 0) {
        const float logit = element(args.logits, args.logits_dtype, row * args.candidates + j);
        args.reward[row * args.candidates + j] = reward;
        scores[j] = logit == -INFINITY ? logit : logit + args.weight * reward;
      }
    }
    thread.sync();
    if (thread.warp() != 0) return;
    int64_t index = largest(thread, scores, args.candidates);
    if (args.uniforms != nullptr && fabsf(scores[index]) < INFINITY) index = sampled(thread, args, row, scores, index);
    if (thread.lane() == 0) args.index[row] = index;
  }

 private:
  // The first of the largest.
  static GGRO_DEVICE int64_t largest(const Thread& thread, const float* scores, int64_t candidates) {
    uint32_t best = 0;
    int64_t index = candidates;
    for (int64_t j = thread.lane(); j < candidates; j += 32) {
      const uint32_t key = order_key(scores[j]);
      if (key > best) {
        best = key;
        index = j;
      }
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      const uint32_t other = thread.shuffle_xor(best, mask);
      const int64_t its_index = thread.shuffle_xor(index, mask);
      if (other > best || (other == best && its_index < index)) {
        best = other;
        index = its_index;
      }
    }
    return index;
  }

  // The smallest j whose sum of e^(score / temperature) up to it exceeds uniform * total, summed in order and in fp64.
  static GGRO_DEVICE int64_t sampled(const Thread& thread, const Args& args, int64_t row, const float* scores,
                                     int64_t best) {
    const double largest_score = scores[best];
    // Calls visit(j, sum up to j) in order, the same in all lanes.
    const auto walk = [&](auto visit) {
      double sum = 0.0;
      for (int64_t first = 0; first < args.candidates; first += 32) {
        const int64_t mine = first + thread.lane();
        const double power = mine < args.candidates ? exp((scores[mine] - largest_score) / args.temperature) : 0.0;
        for (int lane = 0; lane < 32; ++lane) {
          sum += thread.shuffle(power, lane);
          visit(first + lane, sum);
        }
      }
    };
    double total = 0.0;
    walk([&](int64_t, double sum) { total = sum; });
    const double threshold = static_cast<double>(args.uniforms[row]) * total;
    int64_t chosen = args.candidates - 1;
    walk([&](int64_t j, double sum) {
      if (sum > threshold && j < chosen) chosen = j;
    });
    return chosen;
  }
};

}  // namespace

int64_t score_select_workspace(const ScoreSelectArgs&) { return 0; }

void score_select(const ScoreSelectArgs& args, void*, const Stream& stream) {
  if (args.rows == 0) return;
  with_dtype(args.hidden_dtype, [&](auto hidden) {
    with_dtype(args.head_dtype, [&](auto head) {
      launch<Kernel<decltype(hidden), decltype(head)>>("score_select", args.rows, 0, args, stream);
    });
  });
}

}  // namespace ggro::cuda
