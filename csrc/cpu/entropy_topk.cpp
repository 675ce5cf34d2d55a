#include "ggro/entropy_topk.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "dtypes.h"
#include "kernels.h"
#include "simd.h"
#include "softmax_sums.h"
#include "threads.h"
#include "top_k.h"

// Floor: one read of the logits, and one exponential each, whichever takes longer.
// Every row is cut into blocks of kBlock columns. A block is read once from memory into the first-level cache and there
// gives its maximum m, the shifted sums s = sum e^(x-m) and t = sum (x-m) e^(x-m), and the maximum of every vector
// lane. Sums are merged in block order, so a row's result does not depend on how its blocks were shared between
// threads. The lane maxima give a lower bound on the k-th largest value; the few columns above it are then gathered
// from those few blocks whose maximum exceeds it, still in the second-level cache.
namespace ggro::cpu {
namespace {

constexpr int64_t kBlock = 2048;
static_assert(kBlock % kStep == 0);

constexpr int64_t kMinBlocksPerThread = 16;

// Columns fetched into the cache ahead of those that are read; the processor's own prefetcher falls behind.
constexpr int64_t kFetchAhead = 512;

// Reads a block from memory into fp32 and takes the maximum of every lane. It does so in steps, which the sums of the
// block before are interleaved with: reading keeps other units of the processor busy than arithmetic does.
template <typename T>
class BlockReader {
 public:
  // scratch: [kBlock], in use until the block is done with. Fetching ahead may go beyond the logits, which is
  // harmless.
  void start(const T* block, int64_t columns, float* scratch) {
    block_ = block;
    columns_ = columns;
    scratch_ = scratch;
    read_ = 0;
    for (int u = 0; u < kUnroll; ++u) largest_[u] = broadcast(-kInfinity);
  }

  // The next kStep columns, if so many are left.
  void step() {
    if (read_ + kStep > columns_) return;
    for (size_t byte = 0; byte < kStep * sizeof(T); byte += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(block_ + read_ + kFetchAhead) + byte);
    }
    take(block_ + read_);
  }

  // Whatever steps left. The fp32 columns, padded with -inf to a multiple of kStep.
  const float* finish() {
    while (read_ + kStep <= columns_) step();
    if (read_ == columns_) return kInPlace ? reinterpret_cast<const float*>(block_) : scratch_;
    const int64_t first = kInPlace ? 0 : read_;
    for (int64_t i = first; i < columns_; ++i) scratch_[i] = to_float(block_[i]);
    for (int64_t i = columns_; i < read_ + kStep; ++i) scratch_[i] = -kInfinity;
    for (int u = 0; u < kUnroll; ++u) largest_[u] = max(load(scratch_ + read_ + u * kLanes), largest_[u]);
    return scratch_;
  }

  // Ignores NaN.
  Vec lane_max() const { return max(max(largest_[0], largest_[1]), max(largest_[2], largest_[3])); }

 private:
  // Full fp32 blocks are used where they lie.
  static constexpr bool kInPlace = std::is_same_v<T, float>;

  void take(const T* columns) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const Vec x = load(columns + u * kLanes);
      if constexpr (!kInPlace) store(scratch_ + read_ + u * kLanes, x);
      largest_[u] = max(x, largest_[u]);
    }
    read_ += kStep;
  }

  const T* block_;
  int64_t columns_;
  float* scratch_;
  int64_t read_;
  Vec largest_[kUnroll];
};

template <typename T>
class EntropyTopK {
 public:
  explicit EntropyTopK(const EntropyTopKArgs& args)
      : args_(args),
        scale_(static_cast<float>(kLog2E<double> / args.temperature)),
        blocks_((args.vocab + kBlock - 1) / kBlock) {}

  void run() const {
    const int64_t units = args_.rows * blocks_;
    const int64_t threads = thread_count(args_.num_threads, units, units, kMinBlocksPerThread);
    const std::unique_ptr<Candidate[]> candidates(new Candidate[threads * kSlots * TopK::capacity(args_.k)]);
    const std::unique_ptr<BlockSums[]> sums(new BlockSums[threads * kSlots * blocks_]);
    const std::unique_ptr<int32_t[]> lane_keys(new int32_t[threads * blocks_ * kLanes]);
    const std::unique_ptr<Piece[]> pieces(new Piece[threads * kPieces]);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
    for (int64_t thread = 0; thread < threads; ++thread) {
      const Workspace workspace = {candidates.get() + thread * kSlots * TopK::capacity(args_.k),
                                   sums.get() + thread * kSlots * blocks_, lane_keys.get() + thread * blocks_ * kLanes,
                                   pieces.get() + thread * kPieces};
      run_range(units * thread / threads, units * (thread + 1) / threads, workspace);
    }
    if (threads > 1) merge_pieces(pieces.get(), threads * kPieces, candidates.get());
  }

 private:
  // A thread takes a contiguous range of blocks: whole rows, and at most one piece of a row at each end.
  static constexpr int64_t kPieces = 2;
  // Room for the whole row at hand, and for each piece until they are merged.
  static constexpr int64_t kSlots = 1 + kPieces;

  // What one thread found in its piece of a row.
  struct Piece {
    int64_t row = -1;
    int64_t blocks = 0;
    const BlockSums* sums = nullptr;
    const Candidate* candidates = nullptr;
    int64_t count = 0;
  };

  struct Workspace {
    Candidate* candidates;  // [kSlots, TopK::capacity(k)]
    BlockSums* sums;        // [kSlots, blocks]
    int32_t* lane_keys;     // [blocks, kLanes]
    Piece* pieces;          // [kPieces]
  };

  const T* row_pointer(int64_t row) const { return static_cast<const T*>(args_.logits) + row * args_.row_stride; }

  int64_t block_columns(int64_t block) const { return std::min(kBlock, args_.vocab - block * kBlock); }

  // Sums of `blocks` blocks, and all candidates for the top k among their columns.
  void scan(const T* row, int64_t first_block, int64_t blocks, BlockSums* sums, int32_t* lane_keys, TopK& top) const {
    alignas(64) float scratch[2][kBlock];
    BlockReader<T> reader;
    reader.start(row + first_block * kBlock, block_columns(first_block), scratch[0]);
    for (int64_t i = 0; i < blocks; ++i) {
      const float* x = reader.finish();
      float lanes[kLanes];
      store(lanes, reader.lane_max());
      float largest = lanes[0];
      for (int lane = 0; lane < kLanes; ++lane) {
        lane_keys[i * kLanes + lane] = ordered_key(lanes[lane]);
        largest = std::max(largest, lanes[lane]);
      }
      const int64_t next = first_block + i + 1;
      reader.start(row + next * kBlock, i + 1 < blocks ? block_columns(next) : 0, scratch[(i + 1) % 2]);
      const int64_t padded = (block_columns(first_block + i) + kStep - 1) / kStep * kStep;
      sums[i] = block_sums(x, padded, largest, scale_, [&reader] { reader.step(); });
    }
    top.start_from(lane_keys, blocks * kLanes);
    for (int64_t i = 0; i < blocks; ++i) {
      if (!top.may_accept(sums[i].max, std::isnan(sums[i].sum))) continue;
      const int64_t first = (first_block + i) * kBlock;
      top.offer(row + first, block_columns(first_block + i), first);
    }
  }

  void run_range(int64_t first, int64_t last, const Workspace& workspace) const {
    Piece* piece = workspace.pieces;
    for (int64_t unit = first; unit < last;) {
      const int64_t row = unit / blocks_;
      const int64_t first_block = unit % blocks_;
      const int64_t blocks = std::min(blocks_ - first_block, last - unit);
      unit += blocks;
      const bool whole = blocks == blocks_;
      const int64_t slot = whole ? 0 : 1 + (piece - workspace.pieces);
      BlockSums* sums = workspace.sums + slot * blocks_;
      TopK top(workspace.candidates + slot * TopK::capacity(args_.k), args_.k);
      scan(row_pointer(row), first_block, blocks, sums, workspace.lane_keys, top);
      if (whole) {
        RowSums row_sums(1.0 / args_.temperature);
        for (int64_t i = 0; i < blocks; ++i) row_sums.fold(sums[i]);
        write(row, row_sums, top);
      } else {
        top.prune();
        *piece++ = {row, blocks, sums, top.candidates(), top.count()};
      }
    }
  }

  // Pieces are in block order.
  void merge_pieces(const Piece* pieces, int64_t count, Candidate* buffer) const {
    for (int64_t i = 0; i < count;) {
      const int64_t row = pieces[i].row;
      if (row < 0) {
        ++i;
        continue;
      }
      TopK top(buffer, args_.k);
      RowSums sums(1.0 / args_.temperature);
      for (; i < count && (pieces[i].row == row || pieces[i].row < 0); ++i) {
        for (int64_t block = 0; block < pieces[i].blocks; ++block) sums.fold(pieces[i].sums[block]);
        for (int64_t j = 0; j < pieces[i].count; ++j) top.add(pieces[i].candidates[j]);
      }
      write(row, sums, top);
    }
  }

  void write(int64_t row, const RowSums& sums, TopK& top) const {
    args_.entropy[row] = sums.entropy();
    args_.logsumexp[row] = sums.logsumexp();
    top.sort();
    const T* logits = row_pointer(row);
    T* values = static_cast<T*>(args_.values) + row * args_.k;
    int64_t* indices = args_.indices + row * args_.k;
    for (int64_t i = 0; i < args_.k; ++i) {
      indices[i] = candidate_index(top.candidates()[i]);
      std::memcpy(values + i, logits + indices[i], sizeof(T));
    }
  }

  const EntropyTopKArgs& args_;
  float scale_;
  int64_t blocks_;
};

}  // namespace

namespace GGRO_ISA {

void entropy_topk(const EntropyTopKArgs& args) {
  with_dtype(args.dtype, [&](auto element) { EntropyTopK<decltype(element)>(args).run(); });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
