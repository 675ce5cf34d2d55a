#include "dtypes.h"
#include "ggro/cuda.h"
#include "vocabulary.h"

namespace ggro::cuda {

int64_t entropy_topk_workspace(const EntropyTopKArgs& args) {
  return 4 * Reduced::floats(args.rows, args.vocab, args.k, true);
}

void entropy_topk(const EntropyTopKArgs& args, void* workspace, const Stream& stream) {
  if (args.rows == 0) return;
  const int64_t chunks = divide_up(args.vocab, kChunk);
  const int64_t groups = chunks * (kChunk / group_of(args.k));
  auto* maxima = static_cast<float*>(workspace);
  const Reduced reduced = {maxima, maxima + args.rows * groups, chunks};
  const bool grouped = args.vocab > searched_whole(args.k);
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const T* logits = static_cast<const T*>(args.logits);
    reduce<T>("entropy_topk: reduce",
              {logits, args.row_stride, args.vocab, args.rows, chunks, 0, args.temperature, reduced}, args.k, stream);
    select<T>("entropy_topk: select", args.rows,
              {logits,
               args.row_stride,
               static_cast<int>(args.vocab),
               static_cast<int>(args.k),
               {grouped ? reduced.maxima : nullptr, reduced.sums, chunks},
               static_cast<int>(groups),
               0,
               nullptr,
               static_cast<T*>(args.values),
               args.indices,
               args.k,
               args.entropy,
               args.logsumexp},
              true, stream);
  });
}

}  // namespace ggro::cuda
