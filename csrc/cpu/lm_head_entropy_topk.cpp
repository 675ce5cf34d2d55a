#include "ggro/lm_head_entropy_topk.h"

#include <algorithm>
#include <memory>

#include "dtypes.h"
#include "kernels.h"
#include "slab_product.h"
#include "softmax_sums.h"
#include "top_k.h"

// Floor: one read of the weight, or 2 * rows * vocab * width operations, whichever takes longer; beside them one
// exponential a logit, or two with a softcap. Logits live in the second-level cache, one slab of the weight at a time.
// The sums of all slabs are kept and folded in order, so that a row's result does not depend on the threads.
namespace ggro::cpu {
namespace {

// Fewer multiply-adds than this per thread cost less than waking the thread.
constexpr int64_t kMinWorkPerThread = 1 << 18;
static_assert(kSlab % kStep == 0);

template <typename H, typename W>
class LmHeadEntropyTopK {
 public:
  explicit LmHeadEntropyTopK(const LmHeadEntropyTopKArgs& args)
      : args_(args),
        slabs_((args.vocab + kSlab - 1) / kSlab),
        threads_(std::max<int64_t>(
            1, std::min({static_cast<int64_t>(args.num_threads), slabs_,
                         args.rows * args.vocab * std::max<int64_t>(args.width, 1) / kMinWorkPerThread}))),
        sums_(new BlockSums[args.rows * slabs_]),
        top_(threads_, args.rows, args.k) {}

  void run() {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads_) schedule(static, 1) if (threads_ > 1)
#endif
    for (int64_t thread = 0; thread < threads_; ++thread) project_slabs(thread);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads_) if (threads_ > 1)
#endif
    for (int64_t row = 0; row < args_.rows; ++row) write(row);
  }

 private:
  void project_slabs(int64_t thread) {
    SlabProduct<H, W> product(static_cast<const H*>(args_.hidden), args_.hidden_stride, args_.rows,
                              static_cast<const W*>(args_.weight), args_.weight_stride, args_.width);
    const std::unique_ptr<float[]> logits(new float[args_.rows * kSlab]);
    for (int64_t slab = slabs_ * thread / threads_; slab < slabs_ * (thread + 1) / threads_; ++slab) {
      const int64_t first = slab * kSlab;
      const int64_t columns = std::min(kSlab, args_.vocab - first);
      product.multiply(first, columns, logits.get());
      for (int64_t row = 0; row < args_.rows; ++row) {
        float* x = logits.get() + row * kSlab;
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
    float lanes[kLanes];
    store(lanes, largest);
    const int64_t padded = (columns + kStep - 1) / kStep * kStep;
    const float scale = static_cast<float>(1.4426950408889634 / args_.temperature);
    return block_sums(x, padded, *std::max_element(lanes, lanes + kLanes), scale, [] {});
  }

  void write(int64_t row) {
    RowSums sums(1.0 / args_.temperature);
    for (int64_t slab = 0; slab < slabs_; ++slab) sums.fold(sums_[row * slabs_ + slab]);
    args_.entropy[row] = sums.entropy();
    args_.logsumexp[row] = sums.logsumexp();
    const TopK& best = top_.merge(row);
    for (int64_t i = 0; i < args_.k; ++i) {
      args_.values[row * args_.k + i] = candidate_value(best.candidates()[i]);
      args_.indices[row * args_.k + i] = candidate_index(best.candidates()[i]);
    }
  }

  const LmHeadEntropyTopKArgs& args_;
  int64_t slabs_;
  int64_t threads_;
  std::unique_ptr<BlockSums[]> sums_;
  RowTopKs top_;
};

}  // namespace

namespace GGRO_ISA {

void lm_head_entropy_topk(const LmHeadEntropyTopKArgs& args) {
  with_dtypes(args.hidden_dtype, args.weight_dtype,
              [&](auto hidden, auto weight) { LmHeadEntropyTopK<decltype(hidden), decltype(weight)>(args).run(); });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
