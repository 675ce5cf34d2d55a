#include "ggro/lm_head_entropy_topk.h"

#include <algorithm>
#include <memory>

#include "dtypes.h"
#include "kernels.h"
#include "product_top_k.h"
#include "softmax_sums.h"

// Floor: one read of the weight, or 2 * rows * vocab * width operations, whichever takes longer; beside them one
// exponential a logit, or two with a softcap.
namespace ggro::cpu {
namespace {

static_assert(kSlab % kStep == 0);

// Bias, softcap, and the sums of the slab.
BlockSums finish(const LmHeadEntropyTopKArgs& args, int64_t first, int64_t columns, float* x) {
  if (args.bias != nullptr) {
    for (int64_t j = 0; j < columns; ++j) x[j] += args.bias[first + j];
  }
  if (args.softcap != 0.0f) {
    const Vec cap = broadcast(args.softcap);
    for (int64_t j = 0; j < kSlab; j += kLanes) store(x + j, mul(cap, tanh(div(load(x + j), cap))));
  }
  std::fill(x + columns, x + kSlab, -kInfinity);
  Vec largest = broadcast(-kInfinity);
  for (int64_t j = 0; j < kSlab; j += kLanes) largest = max(load(x + j), largest);
  const int64_t padded = (columns + kStep - 1) / kStep * kStep;
  const float scale = static_cast<float>(kLog2E<double> / args.temperature);
  return block_sums(x, padded, horizontal_max(largest), scale, [] {});
}

// Of args.rows, those from `first` on, at most kMaxRows.
template <typename H, typename W>
void run(const LmHeadEntropyTopKArgs& args, int64_t first) {
  const Rows<H> hidden = {static_cast<const H*>(args.hidden) + first * args.hidden_stride, args.hidden_stride,
                          std::min(kMaxRows, args.rows - first)};
  const Rows<W> weight = {static_cast<const W*>(args.weight), args.weight_stride, args.vocab};
  // Kept for all slabs and folded in order, so that a row's result does not depend on the threads.
  const int64_t slabs = slab_count(args.vocab);
  const std::unique_ptr<BlockSums[]> sums(new BlockSums[hidden.count * slabs]);
  product_top_k(
      hidden, weight, args.width, args.k, args.num_threads,
      [&](int64_t row, int64_t column, int64_t columns, float* logits) {
        sums[row * slabs + column / kSlab] = finish(args, column, columns, logits);
      },
      [&](int64_t row, const TopK& top) {
        RowSums row_sums(1.0 / args.temperature);
        for (int64_t slab = 0; slab < slabs; ++slab) row_sums.fold(sums[row * slabs + slab]);
        const int64_t out = first + row;
        args.entropy[out] = row_sums.entropy();
        args.logsumexp[out] = row_sums.logsumexp();
        top.write(args.values + out * args.k, args.indices + out * args.k);
      });
}

}  // namespace

namespace GGRO_ISA {

void lm_head_entropy_topk(const LmHeadEntropyTopKArgs& args) {
  with_dtypes(args.hidden_dtype, args.weight_dtype, [&](auto hidden, auto weight) {
    for (int64_t first = 0; first < args.rows; first += kMaxRows) {
      run<decltype(hidden), decltype(weight)>(args, first);
    }
  });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
