#include "ggro/project_topk.h"

#include <algorithm>
#include <vector>

#include "dtypes.h"
#include "kernels.h"
#include "slab_product.h"
#include "threads.h"
#include "top_k.h"

// Floor: one read of the table, and 2 * positions * vocab * width operations, whichever takes longer. Scores live in
// the second-level cache, one slab of the table at a time, and are compared there with each position's k-th best.
namespace ggro::cpu {
namespace {

// Multiply-adds.
constexpr int64_t kMinWorkPerThread = 1 << 18;

template <typename G, typename T>
class ProjectTopK {
 public:
  // Of args.positions, those from `first` on, at most kMaxRows.
  ProjectTopK(const ProjectTopKArgs& args, int64_t first)
      : args_(args),
        first_(first),
        positions_(std::min(kMaxRows, args.positions - first)),
        slabs_((args.vocab + kSlab - 1) / kSlab),
        threads_(thread_count(args.num_threads, slabs_, positions_ * args.vocab * std::max<int64_t>(args.width, 1),
                              kMinWorkPerThread)),
        top_(threads_, positions_, args.k) {
    const G* gradient = static_cast<const G*>(args.gradient) + first * args.gradient_stride;
    products_.reserve(static_cast<size_t>(threads_));
    for (int64_t thread = 0; thread < threads_; ++thread) {
      products_.emplace_back(gradient, args.gradient_stride, positions_, static_cast<const T*>(args.table),
                             args.table_stride, args.width);
    }
  }

  void run() {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads_) schedule(static, 1) if (threads_ > 1)
#endif
    for (int64_t thread = 0; thread < threads_; ++thread) score_slabs(thread);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads_) if (threads_ > 1)
#endif
    for (int64_t position = 0; position < positions_; ++position) {
      const int64_t first = (first_ + position) * args_.k;
      top_.merge(position).write(args_.scores + first, args_.indices + first);
    }
  }

 private:
  void score_slabs(int64_t thread) {
    for (int64_t slab = slabs_ * thread / threads_; slab < slabs_ * (thread + 1) / threads_; ++slab) {
      const int64_t first = slab * kSlab;
      const int64_t columns = std::min(kSlab, args_.vocab - first);
      float* scores = products_[static_cast<size_t>(thread)].multiply(first, columns);
      for (int64_t position = 0; position < positions_; ++position) {
        float* row = scores + position * kSlab;
        finish(row, first, columns);
        top_.part(thread, position).offer(row, columns, first);
      }
    }
  }

  void finish(float* row, int64_t first, int64_t columns) const {
    if (args_.bias != nullptr) {
      for (int64_t j = 0; j < columns; ++j) row[j] += args_.bias[first + j];
    }
    if (args_.forbidden != nullptr) {
      for (int64_t j = 0; j < columns; ++j) {
        if (args_.forbidden[first + j]) row[j] = -kInfinity;
      }
    }
  }

  const ProjectTopKArgs& args_;
  int64_t first_;
  int64_t positions_;
  int64_t slabs_;
  int64_t threads_;
  std::vector<SlabProduct<G, T>> products_;
  RowTopKs top_;
};

}  // namespace

namespace GGRO_ISA {

void project_topk(const ProjectTopKArgs& args) {
  with_dtypes(args.gradient_dtype, args.table_dtype, [&](auto gradient, auto table) {
    for (int64_t first = 0; first < args.positions; first += kMaxRows) {
      ProjectTopK<decltype(gradient), decltype(table)>(args, first).run();
    }
  });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
