#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "dtypes.h"
#include "gemm.h"
#include "ggro/batch_invariant_linear.h"
#include "kernels.h"
#include "narrow.h"
#include "simd.h"
#include "threads.h"

// Floor: as that of batch_invariant_linear.
//
// Each element sums kBlock weights at a time, in one chain from zero that is then added to the chains before it.
namespace ggro::cpu {
namespace {

// Multiply-adds.
constexpr int64_t kMinWorkPerThread = 1 << 17;

// Rows of the weight that are multiplied while the next ones are fetched. Rows may lie a multiple of 4 KiB apart and
// share few sets of the caches: more of them would drive each other out.
constexpr int64_t kBlock = 16;

// Rows, and columns, that are summed at once: two blocks of the weight stay in the second-level cache beside the sums.
constexpr int64_t kMaxRows = 36;
constexpr int64_t kMaxColumns = 4096;
constexpr int64_t kMaxSums = 1 << 16;

static_assert(kMaxColumns % kTileColumns == 0 && kMaxRows % kTileRows == 0);

inline int64_t tiles_of(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }

// Fetches a part of a matrix into the cache, row after row, a few lines at a time.
class Fetcher {
 public:
  Fetcher(const void* data, int64_t stride_bytes, int64_t rows, int64_t row_bytes)
      : row_(static_cast<const char*>(data)), stride_(stride_bytes), rows_(rows), row_bytes_(row_bytes) {}

  void fetch(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += kCacheLine;
      if (at_ < row_bytes_) continue;
      at_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  const char* row_;
  int64_t stride_;
  int64_t rows_;
  int64_t row_bytes_;
  int64_t at_ = 0;
};

template <typename T>
class BackwardProduct {
 public:
  BackwardProduct(const BatchInvariantLinearBackwardArgs& args, const float* gradient)
      : gradient_(gradient),
        rows_(args.rows),
        weight_(static_cast<const T*>(args.weight)),
        stride_(args.weight_stride),
        outputs_(args.outputs),
        width_(args.width),
        x_gradient_(static_cast<T*>(args.x_gradient)),
        panel_(std::min(kMaxColumns, kMaxSums / std::min(kMaxRows, rows_) / kTileColumns * kTileColumns)),
        sums_(new float[static_cast<size_t>(std::min(kMaxRows, rows_) * panel_)]) {}

  // The columns first .. last - 1 of all rows.
  void compute(int64_t first, int64_t last) {
    const int64_t blocks = (rows_ + kMaxRows - 1) / kMaxRows;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = rows_ * block / blocks;
      const int64_t rows = rows_ * (block + 1) / blocks - row;
      for (int64_t column = first; column < last; column += panel_) {
        sum_panel(row, rows, column, std::min(panel_, last - column));
        for (int64_t r = 0; r < rows; ++r) {
          narrow(sums_.get() + r * panel_, std::min(panel_, last - column), x_gradient_ + (row + r) * width_ + column);
        }
      }
    }
  }

 private:
  void sum_panel(int64_t row, int64_t rows, int64_t column, int64_t columns) {
    for (int64_t n = 0; n < outputs_; n += kBlock) {
      const int64_t depth = std::min(kBlock, outputs_ - n);
      const T* block = weight_ + n * stride_ + column;
      Fetcher next(block + depth * stride_, stride_ * static_cast<int64_t>(sizeof(T)),
                   std::min(kBlock, outputs_ - n - depth), columns * static_cast<int64_t>(sizeof(T)));
      for (int64_t j = 0; j < columns; j += kTileColumns) {
        next.fetch(kBlock * kTileColumns * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(kCacheLine));
        multiply_block(row, rows, n, depth, block + j, std::min<int64_t>(kTileColumns, columns - j), sums_.get() + j);
      }
    }
  }

  // Adds the products with `depth` rows of the weight from n on, whose columns begin at `block`.
  void multiply_block(int64_t row, int64_t rows, int64_t n, int64_t depth, const T* block, int64_t columns,
                      float* sums) const {
    if (columns == kTileColumns) {
      multiply_rows(row, rows, n, depth, block, stride_, sums);
      return;
    }
    float padded[kBlock * kTileColumns];
    for (int64_t i = 0; i < depth; ++i) {
      float* packed = padded + i * kTileColumns;
      widen(block + i * stride_, columns, packed);
      std::fill(packed + columns, packed + kTileColumns, 0.0f);
    }
    multiply_rows(row, rows, n, depth, padded, kTileColumns, sums);
  }

  template <typename B>
  void multiply_rows(int64_t row, int64_t rows, int64_t n, int64_t depth, const B* block, int64_t stride,
                     float* sums) const {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = rows * tile / tiles;
      const int count = static_cast<int>(rows * (tile + 1) / tiles - begin);
      multiply_tile(gradient_ + (row + begin) * outputs_ + n, outputs_, count, block, stride, depth,
                    sums + begin * panel_, panel_, n > 0);
    }
  }

  const float* gradient_;
  int64_t rows_;
  const T* weight_;
  int64_t stride_;
  int64_t outputs_;
  int64_t width_;
  T* x_gradient_;
  int64_t panel_;
  std::unique_ptr<float[]> sums_;
};

template <typename T>
void run(const BatchInvariantLinearBackwardArgs& args) {
  if (args.rows == 0 || args.width == 0) return;
  if (args.outputs == 0) {
    std::fill_n(static_cast<T*>(args.x_gradient), args.rows * args.width, from_float<T>(0.0f));
    return;
  }
  const float* gradient = static_cast<const float*>(args.gradient);
  std::unique_ptr<float[]> widened;
  if (!std::is_same_v<T, float>) {
    widened.reset(new float[static_cast<size_t>(args.rows * args.outputs)]);
    widen(static_cast<const T*>(args.gradient), args.rows * args.outputs, widened.get());
    gradient = widened.get();
  }
  const int64_t tiles = tiles_of(args.width);
  const int threads = thread_count(args.num_threads, tiles, args.rows * args.outputs * args.width, kMinWorkPerThread);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t first = tiles * thread / threads * kTileColumns;
    const int64_t last = std::min(tiles * (thread + 1) / threads * kTileColumns, args.width);
    BackwardProduct<T>(args, gradient).compute(first, last);
  }
}

}  // namespace

namespace GGRO_ISA {

void batch_invariant_linear_backward(const BatchInvariantLinearBackwardArgs& args) {
  with_dtype(args.dtype, [&](auto type) { run<decltype(type)>(args); });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
