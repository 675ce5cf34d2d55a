#include <algorithm>
#include <type_traits>

#include "dtypes.h"
#include "ggro/cuda.h"
#include "scores.h"
#include "vocabulary.h"

// The best rows of a table for each of some vectors, with statistics of the softmax of all of them, in one read of it.
//
// The table is walked in slabs. One launch computes the scores of a slab for all vectors, two of vocabulary.h reduce
// them and select from them while they are in the GPU's cache; with several slabs, another selects from the best of
// each. Sums are those of chunks of the whole vocabulary and selection is exact, so that no bit depends on the slabs.

namespace ggro::cuda {
namespace {

// A slab is a multiple of so many columns, and no less for however many vectors.
constexpr int64_t kTileColumns = 4096;
// Into how many slabs a vocabulary is cut at most, so that the best of each are few enough to be searched whole.
constexpr int64_t kMostSlabs = 32;

struct Projection {
  ScoresArgs scores;  // of the whole table; without a place for them
  DType vectors_dtype;
  DType table_dtype;
  int64_t k;
  float temperature;
  float* values;
  int64_t* indices;
  float* entropy;  // or null
  float* logsumexp;

  int64_t slab() const {
    const int64_t tiles = divide_up(scores.columns, kTileColumns);
    const int64_t at_once = std::max<int64_t>(1, kFloatsAtOnce / (scores.rows * kTileColumns));
    return kTileColumns * std::min(tiles, std::max(at_once, divide_up(tiles, kMostSlabs)));
  }
};

// The parts of the workspace.
struct Workspace {
  int64_t* best_indices;
  float* best_values;
  float* scores;
  float* sums;
  float* maxima;
  int64_t best;  // of one row, from all slabs
  int64_t bytes;

  Workspace(const Projection& p, void* memory) {
    auto* address = static_cast<char*>(memory);
    const auto take = [&](int64_t count, int64_t size) {
      char* taken = address + bytes;
      bytes += divide_up(count * size, 16) * 16;
      return taken;
    };
    bytes = 0;
    const int64_t rows = p.scores.rows, slab = p.slab(), slabs = divide_up(p.scores.columns, slab);
    best = slabs > 1 ? p.k * (slabs - 1) + std::min(p.k, p.scores.columns - (slabs - 1) * slab) : 0;
    best_indices = reinterpret_cast<int64_t*>(take(rows * best, 8));
    best_values = reinterpret_cast<float*>(take(rows * best, 4));
    scores = reinterpret_cast<float*>(take(rows * slab, 4));
    sums = reinterpret_cast<float*>(take(p.entropy == nullptr ? 0 : rows * 3 * divide_up(p.scores.columns, kChunk), 4));
    maxima = reinterpret_cast<float*>(take(Reduced::floats(rows, slab, p.k, false), 4));
  }
};

template <typename A, typename B>
void compute(const ScoresArgs& args, const Stream& stream) {
  const auto with = [&](auto kernel) {
    using Kernel = decltype(kernel);
    const int64_t tiles = divide_up(args.rows, Kernel::kRows) * divide_up(args.columns, Kernel::kColumns);
    launch<Kernel>("projection: scores", tiles, Kernel::kSharedBytes, args, stream);
  };
  if constexpr (std::is_same_v<A, B> && sizeof(A) == 2) {
    with(HalfScoresKernel<A>());
  } else {
    with(FloatScoresKernel<A, B>());
  }
}

template <typename A, typename B>
void project(const Projection& p, const Workspace& workspace, const Stream& stream) {
  const ScoresArgs& all = p.scores;
  const int64_t slab = p.slab(), chunks = divide_up(all.columns, kChunk);
  for (int64_t first = 0, place = 0; first < all.columns; first += slab, place += p.k) {
    ScoresArgs args = all;
    args.table = static_cast<const B*>(all.table) + first * all.table_stride;
    args.bias = all.bias == nullptr ? nullptr : all.bias + first;
    args.forbidden = all.forbidden == nullptr ? nullptr : all.forbidden + first;
    args.columns = std::min(slab, all.columns - first);
    args.scores = workspace.scores;
    args.scores_stride = slab;
    compute<A, B>(args, stream);

    const int64_t k = std::min(p.k, args.columns), slab_chunks = divide_up(args.columns, kChunk);
    const bool grouped = args.columns > searched_whole(p.k), last = first + slab >= all.columns;
    float* sums = p.entropy == nullptr ? nullptr : workspace.sums;
    if (grouped || sums != nullptr) {
      reduce<float>("projection: reduce",
                    {args.scores,
                     slab,
                     args.columns,
                     args.rows,
                     slab_chunks,
                     first / kChunk,
                     p.temperature,
                     {workspace.maxima, sums, chunks}},
                    p.k, stream);
    }
    const bool only = workspace.best == 0;
    select<float>("projection: select", args.rows,
                  {args.scores,
                   slab,
                   static_cast<int>(args.columns),
                   static_cast<int>(k),
                   {grouped ? workspace.maxima : nullptr, sums, chunks},
                   static_cast<int>(slab_chunks * (kChunk / group_of(p.k))),
                   first,
                   nullptr,
                   only ? p.values : workspace.best_values + place,
                   only ? p.indices : workspace.best_indices + place,
                   only ? p.k : workspace.best,
                   last ? p.entropy : nullptr,
                   p.logsumexp},
                  true, stream);
  }
  if (workspace.best == 0) return;
  // Slabs and the best of each are in the order that is wanted among equal values.
  select<float>("projection: select from slabs", all.rows,
                {workspace.best_values,
                 workspace.best,
                 static_cast<int>(workspace.best),
                 static_cast<int>(p.k),
                 {nullptr, nullptr, 0},
                 0,
                 0,
                 workspace.best_indices,
                 p.values,
                 p.indices,
                 p.k,
                 nullptr,
                 nullptr},
                true, stream);
}

void project(const Projection& p, void* memory, const Stream& stream) {
  if (p.scores.rows == 0) return;
  const Workspace workspace(p, memory);
  with_dtype(p.vectors_dtype, [&](auto vectors) {
    with_dtype(p.table_dtype, [&](auto table) { project<decltype(vectors), decltype(table)>(p, workspace, stream); });
  });
}

Projection of(const ProjectTopKArgs& a) {
  return {{a.gradient, a.gradient_stride, a.table, a.table_stride, a.positions, a.vocab, a.width, a.bias, a.forbidden,
           0.0f, nullptr, 0},
          a.gradient_dtype,
          a.table_dtype,
          a.k,
          1.0f,
          a.scores,
          a.indices,
          nullptr,
          nullptr};
}

Projection of(const LmHeadEntropyTopKArgs& a) {
  return {{a.hidden, a.hidden_stride, a.weight, a.weight_stride, a.rows, a.vocab, a.width, a.bias, nullptr, a.softcap,
           nullptr, 0},
          a.hidden_dtype,
          a.weight_dtype,
          a.k,
          a.temperature,
          a.values,
          a.indices,
          a.entropy,
          a.logsumexp};
}

template <typename Args>
int64_t workspace_of(const Args& args) {
  const Projection p = of(args);
  return p.scores.rows == 0 ? 0 : Workspace(p, nullptr).bytes;
}

}  // namespace

int64_t lm_head_entropy_topk_workspace(const LmHeadEntropyTopKArgs& args) { return workspace_of(args); }

void lm_head_entropy_topk(const LmHeadEntropyTopKArgs& args, void* workspace, const Stream& stream) {
  project(of(args), workspace, stream);
}

int64_t project_topk_workspace(const ProjectTopKArgs& args) { return workspace_of(args); }

void project_topk(const ProjectTopKArgs& args, void* workspace, const Stream& stream) {
  project(of(args), workspace, stream);
}

}  // namespace ggro::cuda
