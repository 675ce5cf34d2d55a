#include "ggro/candidate_scores.h"

#include <algorithm>
#include <memory>

#include "dot.h"
#include "dtypes.h"
#include "ggro/errors.h"
#include "kernels.h"
#include "threads.h"

// Floor: one read of the rows that ids name, anywhere in the table, and width multiply-adds for each.
namespace ggro::cpu {
namespace {

// Multiply-adds.
constexpr int64_t kMinWorkPerThread = 1 << 16;

// The rows lie anywhere, so that the processor cannot foresee them: so much is fetched before it is used.
constexpr int64_t kBytesAhead = 16384;

template <typename G, typename T>
void run(const CandidateScoresArgs& args) {
  const int64_t pairs = args.positions * args.candidates;
  if (pairs == 0) return;
  const int threads = thread_count(args.num_threads, pairs, pairs * args.width, kMinWorkPerThread);
  const G* gradient = static_cast<const G*>(args.gradient);
  const T* table = static_cast<const T*>(args.table);
  constexpr int64_t kLineElements = kCacheLine / sizeof(T);
  const int64_t rows_ahead = 1 + kBytesAhead / (args.width * static_cast<int64_t>(sizeof(T)) + 1);
  const std::unique_ptr<float[]> widened(new float[static_cast<size_t>(threads * args.width)]);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
  for (int thread = 0; thread < threads; ++thread) {
    float* row = widened.get() + thread * args.width;
    int64_t position = -1;
    const int64_t last = pairs * (thread + 1) / threads - 1;
    for (int64_t i = pairs * thread / threads; i <= last; ++i) {
      if (i / args.candidates != position) {
        position = i / args.candidates;
        widen(gradient + position * args.gradient_stride, args.width, row);
      }
      const T* to_come = table + args.ids[std::min(i + rows_ahead, last)] * args.table_stride;
      args.scores[i] = dot(row, table + args.ids[i] * args.table_stride, args.width, [to_come](int64_t column) {
        for (int64_t j = 0; j < kDotStep; j += kLineElements) __builtin_prefetch(to_come + column + j);
      });
    }
  }
}

}  // namespace

namespace GGRO_ISA {

void candidate_scores(const CandidateScoresArgs& args) {
  for (int64_t i = 0; i < args.positions * args.candidates; ++i) {
    if (args.ids[i] >= 0 && args.ids[i] < args.vocab) continue;
    throw_out_of_range("ids", i / args.candidates, i % args.candidates, args.ids[i], args.vocab - 1,
                       "the rows of the table");
  }
  with_dtypes(args.gradient_dtype, args.table_dtype,
              [&](auto gradient, auto table) { run<decltype(gradient), decltype(table)>(args); });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
