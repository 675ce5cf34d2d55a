#include "ggro/lm_head_entropy_topk.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "dtypes.h"
#include "kernels.h"
#include "slab_product.h"
#include "softmax_sums.h"
#include "threads.h"
#include "top_k.h"

// Floor: one read of the weight, or 2 * rows * vocab * width operations, whichever takes longer; beside them one
// exponential a logit, or two with a softcap. Logits live in the second-level cache, one slab of the weight at a time.
// The sums of all slabs are kept and folded in order, so that a row's result does not depend on the threads.
namespace ggro::cpu {
namespace {

// Multiply-adds.
constexpr int64_t kMinWorkPerThread = 1 << 18;
static_assert(kSlab % kStep == 0);

template <typename H, typename W>
class LmHeadEntropyTopK {
 public:
  // Of args.rows, those from `first` on, at most kMaxRows.
  LmHeadEntropyTopK(const LmHeadEntropyTopKArgs& args, int64_t first)
      : args_(args),
        first_(first),
        rows_(std::min(kMaxRows, args.rows - first)),
        slabs_((args.vocab + kSlab - 1) / kSlab),
        threads_(thread_count(args.num_threads, slabs_, rows_ * args.vocab * std::max<int64_t>(args.width, 1),
                              kMinWorkPerThread)),
        sums_(new BlockSums[rows_ * slabs_]),
        top_(threads_, rows_, args.k) {
    const H* hidden = static_cast<const H*>(args.hidden) + first * args.hidden_stride;
    products_.reserve(static_cast<size_t>(threads_));
    for (int64_t thread = 0; thread < threads_; ++thread) {
      products_.emplace_back(hidden, args.hidden_stride, rows_, static_cast<const W*>(args.weight), args.weight_stride,
                             args.width);
    }
  }

  void run() {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads_) schedule(static, 1) if (threads_ > 1)
#endif
    for (int64_t thread = 0; thread < threads_; ++thread) project_slabs(thread);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads_) if (threads_ > 1)
#endif
    for (int64_t row = 0; row < rows_; ++row) write(row);
  }

 private:
  void project_slabs(int64_t thread) {
    for (int64_t slab = slabs_ * thread / threads_; slab < slabs_ * (thread + 1) / threads_; ++slab) {
      const int64_t first = slab * kSlab;
      const int64_t columns = std::min(kSlab, args_.vocab - first);
      float* logits = products_[static_cast<size_t>(thread)].multiply(first, columns);
      for (int64_t row = 0; row < rows_; ++row) {
        float* x = logits + row * kSlab;
        sums_[row * slabs_ + slab] = finish(x, first, columns);
        top_.part(thread, row).offer(x, columns, first);
      }
    }
  }

  // Bias, softcap, and the sums of the slab.
  BlockSums finish(float* x, int64_t first, int64_t columns) const {
    if (args_.bias != nullptr) {
      for (int64_t j = 0; j < columns; ++j) x[j] += args_.bias[first + j];
    }
    if (args_.softcap != 0.0f) {
      const Vec cap = broadcast(args_.softcap);
      for (int64_t j = 0; j < kSlab; j += kLanes) store(x + j, mul(cap, tanh(div(load(x + j), cap))));
    }
    std::fill(x + columns, x + kSlab, -kInfinity);
    Vec largest = broadcast(-kInfinity);
    for (int64_t j = 0; j < kSlab; j += kLanes) largest = max(load(x + j), largest);
    const int64_t padded = (columns + kStep - 1) / kStep * kStep;
    const float scale = static_cast<float>(kLog2E<double> / args_.temperature);
    return block_sums(x, padded, horizontal_max(largest), scale, [] {});
  }

  void write(int64_t row) {
    RowSums sums(1.0 / args_.temperature);
    for (int64_t slab = 0; slab < slabs_; ++slab) sums.fold(sums_[row * slabs_ + slab]);
    args_.entropy[first_ + row] = sums.entropy();
    args_.logsumexp[first_ + row] = sums.logsumexp();
    const int64_t first = (first_ + row) * args_.k;
    top_.merge(row).write(args_.values + first, args_.indices + first);
  }

  const LmHeadEntropyTopKArgs& args_;
  int64_t first_;
  int64_t rows_;
  int64_t slabs_;
  int64_t threads_;
  std::vector<SlabProduct<H, W>> products_;
  std::unique_ptr<BlockSums[]> sums_;
  RowTopKs top_;
};

}  // namespace

namespace GGRO_ISA {

void lm_head_entropy_topk(const LmHeadEntropyTopKArgs& args) {
  with_dtypes(args.hidden_dtype, args.weight_dtype, [&](auto hidden, auto weight) {
    for (int64_t first = 0; first < args.rows; first += kMaxRows) {
      LmHeadEntropyTopK<decltype(hidden), decltype(weight)>(args, first).run();
    }
  });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
