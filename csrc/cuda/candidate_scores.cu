#include "dot.h"
#include "dtypes.h"
#include "ggro/cuda.h"

namespace ggro::cuda {
namespace {

// A warp a candidate. Its row of the table is read once; the gradient, from the cache but for the first time.
template <typename G, typename T>
struct Kernel {
  using Args = CandidateScoresArgs;
  static constexpr int kThreads = 128;

  static GGRO_DEVICE void run(Thread& thread, const Args& args) {
    const int64_t pair = thread.block() * (kThreads / 32) + thread.warp();
    if (pair >= args.positions * args.candidates) return;
    const int64_t id = args.ids[pair];
    float score = NAN;
    if (id >= 0 && id < args.vocab) {
      const G* gradient = static_cast<const G*>(args.gradient) + pair / args.candidates * args.gradient_stride;
      score = warp_dot(thread, gradient, static_cast<const T*>(args.table) + id * args.table_stride, args.width);
    }
    if (thread.lane() == 0) args.scores[pair] = score;
  }
};

}  // namespace

int64_t candidate_scores_workspace(const CandidateScoresArgs&) { return 0; }

void candidate_scores(const CandidateScoresArgs& args, void*, const Stream& stream) {
  const int64_t pairs = args.positions * args.candidates;
  if (pairs == 0) return;
  with_dtype(args.gradient_dtype, [&](auto gradient) {
    with_dtype(args.table_dtype, [&](auto table) {
      using K = Kernel<decltype(gradient), decltype(table)>;
      launch<K>("candidate_scores", (pairs + K::kThreads / 32 - 1) / (K::kThreads / 32), 0, args, stream);
    });
  });
}

}  // namespace ggro::cuda
