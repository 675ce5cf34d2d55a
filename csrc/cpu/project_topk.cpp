#include "ggro/project_topk.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "dtypes.h"
#include "kernels.h"
#include "slab_product.h"
#include "top_k.h"

// Floor: one read of the table, and 2 * positions * vocab * width operations, whichever takes longer. Scores live in
// the second-level cache, one slab of the table at a time, and are compared there with each position's k-th best.
namespace ggro::cpu {
namespace {

// Fewer multiply-adds than this per thread cost less than waking the thread.
constexpr int64_t kMinWorkPerThread = 1 << 18;

template <typename G, typename T>
class ProjectTopK {
 public:
  explicit ProjectTopK(const ProjectTopKArgs& args)
      : args_(args),
        slabs_((args.vocab + kSlab - 1) / kSlab),
        threads_(std::max<int64_t>(
            1, std::min({static_cast<int64_t>(args.num_threads), slabs_,
                         args.positions * args.vocab * std::max<int64_t>(args.width, 1) / kMinWorkPerThread}))),
        top_(threads_, args.positions, args.k) {}

  void run() {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads_) schedule(static, 1) if (threads_ > 1)
#endif
    for (int64_t thread = 0; thread < threads_; ++thread) score_slabs(thread);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads_) if (threads_ > 1)
#endif
    for (int64_t position = 0; position < args_.positions; ++position) {
      const TopK& best = top_.merge(position);
      for (int64_t i = 0; i < args_.k; ++i) {
        args_.scores[position * args_.k + i] = candidate_value(best.candidates()[i]);
        args_.indices[position * args_.k + i] = candidate_index(best.candidates()[i]);
      }
    }
  }

 private:
  void score_slabs(int64_t thread) {
    SlabProduct<G, T> product(static_cast<const G*>(args_.gradient), args_.gradient_stride, args_.positions,
                              static_cast<const T*>(args_.table), args_.table_stride, args_.width);
    const std::unique_ptr<float[]> scores(new float[args_.positions * kSlab]);
    for (int64_t slab = slabs_ * thread / threads_; slab < slabs_ * (thread + 1) / threads_; ++slab) {
      const int64_t first = slab * kSlab;
      const int64_t columns = std::min(kSlab, args_.vocab - first);
      product.multiply(first, columns, scores.get());
      for (int64_t position = 0; position < args_.positions; ++position) {
        float* row = scores.get() + position * kSlab;
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
        if (args_.forbidden[first + j]) row[j] = -std::numeric_limits<float>::infinity();
      }
    }
  }

  const ProjectTopKArgs& args_;
  int64_t slabs_;
  int64_t threads_;
  RowTopKs top_;
};

}  // namespace

namespace GGRO_ISA {

void project_topk(const ProjectTopKArgs& args) {
  with_dtypes(args.gradient_dtype, args.table_dtype,
              [&](auto gradient, auto table) { ProjectTopK<decltype(gradient), decltype(table)>(args).run(); });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
