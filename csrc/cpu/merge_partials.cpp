#include "ggro/merge_partials.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "dtypes.h"
#include "kernels.h"
#include "threads.h"
#include "top_k.h"

// Floor: one read of shards * k values and indices a row and their selection, about shards * k * log2(k) comparisons;
// beside them one exponential a shard.
namespace ggro::cpu {
namespace {

constexpr int64_t kMinValuesPerThread = 2048;

struct Shard {
  int64_t offset;
  int64_t position;
};

struct Earlier {
  bool operator()(const Shard& a, const Shard& b) const {
    return a.offset != b.offset ? a.offset < b.offset : a.position < b.position;
  }
};

// A selected value of one shard: where it is, and what it is ordered by.
struct Selected {
  uint32_t key;
  int64_t index;
  int64_t source;
};

struct BetterSelected {
  bool operator()(const Selected& a, const Selected& b) const {
    return a.key != b.key ? a.key > b.key : a.index < b.index;
  }
};

void merge_statistics(const MergePartialsArgs& args, const Shard* shards, int64_t row) {
  double largest = -kInfinity;
  for (int64_t i = 0; i < args.shards; ++i) {
    const double part = args.logsumexp[shards[i].position * args.rows + row];
    // Once NaN, it stays.
    largest = part > largest || std::isnan(part) ? part : largest;
  }
  if (!std::isfinite(largest)) {
    args.merged_logsumexp[row] = static_cast<float>(largest);
    args.merged_entropy[row] = kNaN;
    return;
  }
  double sum = 0.0;
  for (int64_t i = 0; i < args.shards; ++i) {
    sum += std::exp(args.logsumexp[shards[i].position * args.rows + row] - largest);
  }
  const double logsumexp = largest + std::log(sum);
  double entropy = 0.0;
  for (int64_t i = 0; i < args.shards; ++i) {
    const int64_t at = shards[i].position * args.rows + row;
    const double part = args.logsumexp[at];
    if (part == -kInfinity) continue;
    entropy += std::exp(part - logsumexp) * (args.entropy[at] + (logsumexp - part));
  }
  args.merged_logsumexp[row] = static_cast<float>(logsumexp);
  args.merged_entropy[row] = static_cast<float>(entropy);
}

template <typename T>
void merge_selection(const MergePartialsArgs& args, const Shard* shards, int64_t row, Selected* selected) {
  const T* values = static_cast<const T*>(args.values);
  int64_t count = 0;
  for (int64_t i = 0; i < args.shards; ++i) {
    const int64_t first = (shards[i].position * args.rows + row) * args.k;
    for (int64_t j = first; j < first + args.k; ++j) {
      const uint32_t key = static_cast<uint32_t>(make_candidate(to_float(values[j]), 0) >> 32);
      selected[count++] = {key, args.indices[j] + shards[i].offset, j};
    }
  }
  std::partial_sort(selected, selected + args.k, selected + count, BetterSelected());
  T* merged = static_cast<T*>(args.merged_values) + row * args.k;
  for (int64_t j = 0; j < args.k; ++j) {
    merged[j] = values[selected[j].source];
    args.merged_indices[row * args.k + j] = selected[j].index;
  }
}

template <typename T>
void run(const MergePartialsArgs& args) {
  const std::unique_ptr<Shard[]> shards(new Shard[args.shards]);
  for (int64_t i = 0; i < args.shards; ++i) shards[i] = {args.offsets[i], i};
  std::sort(shards.get(), shards.get() + args.shards, Earlier());
  const int64_t values_per_row = args.shards * args.k;
  const int threads = thread_count(args.num_threads, args.rows, args.rows * values_per_row, kMinValuesPerThread);
  const std::unique_ptr<Selected[]> selected(new Selected[threads * values_per_row]);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
  for (int thread = 0; thread < threads; ++thread) {
    for (int64_t row = args.rows * thread / threads; row < args.rows * (thread + 1) / threads; ++row) {
      merge_statistics(args, shards.get(), row);
      merge_selection<T>(args, shards.get(), row, selected.get() + thread * values_per_row);
    }
  }
}

}  // namespace

namespace GGRO_ISA {

void merge_partials(const MergePartialsArgs& args) {
  with_dtype(args.dtype, [&](auto type) { run<decltype(type)>(args); });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
