#include "ggro/project_topk.h"

#include <algorithm>

#include "dtypes.h"
#include "kernels.h"
#include "product_top_k.h"

// Floor: one read of the table, and 2 * positions * vocab * width operations, whichever takes longer.
namespace ggro::cpu {
namespace {

void finish(const ProjectTopKArgs& args, int64_t first, int64_t columns, float* scores) {
  if (args.bias != nullptr) {
    for (int64_t j = 0; j < columns; ++j) scores[j] += args.bias[first + j];
  }
  if (args.forbidden != nullptr) {
    for (int64_t j = 0; j < columns; ++j) {
      if (args.forbidden[first + j]) scores[j] = -kInfinity;
    }
  }
}

// Of args.positions, those from `first` on, at most kMaxRows.
template <typename G, typename T>
void run(const ProjectTopKArgs& args, int64_t first) {
  const Rows<G> gradient = {static_cast<const G*>(args.gradient) + first * args.gradient_stride, args.gradient_stride,
                            std::min(kMaxRows, args.positions - first)};
  const Rows<T> table = {static_cast<const T*>(args.table), args.table_stride, args.vocab};
  product_top_k(
      gradient, table, args.width, args.k, args.num_threads,
      [&](int64_t, int64_t column, int64_t columns, float* scores) { finish(args, column, columns, scores); },
      [&](int64_t position, const TopK& top) {
        const int64_t out = (first + position) * args.k;
        top.write(args.scores + out, args.indices + out);
      });
}

}  // namespace

namespace GGRO_ISA {

void project_topk(const ProjectTopKArgs& args) {
  with_dtypes(args.gradient_dtype, args.table_dtype, [&](auto gradient, auto table) {
    for (int64_t first = 0; first < args.positions; first += kMaxRows) {
      run<decltype(gradient), decltype(table)>(args, first);
    }
  });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
