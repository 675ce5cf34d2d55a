#include "ggro/batch_invariant_linear.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "counts.h"
#include "dtypes.h"
#include "horizontal_sums.h"
#include "kernels.h"
#include "narrow.h"
#include "simd.h"
#include "threads.h"

// Floor: one read of the weights for a few rows, rows * outputs * width multiply-adds for many.
//
// Lane l of a row's and an output's vector sums the products at l, l + kLanes, ... in that order, and the lanes are
// added as horizontal_sum adds them: on every path, whatever tile a sum is part of.
namespace ggro::cpu {
namespace {

// Multiply-adds.
constexpr int64_t kMinWorkPerThread = 1 << 17;

// Threads begin at multiples of so many outputs, no fewer than a tile has.
constexpr int64_t kOutputsPerBlock = 16;

// Bytes of rows that are multiplied with a tile of the weights before the next one: they stay in the second-level
// cache.
constexpr int64_t kRowBytes = 1 << 19;

// Outputs of a tile by its rows: as many sums as leave the rows and one vector of the weights in registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 4;
constexpr int kTileOutputs[kTileRows + 1] = {0, 16, 8, 8, 6};
#else
constexpr int kTileRows = 3;
constexpr int kTileOutputs[kTileRows + 1] = {0, 8, 4, 4};
#endif

// Rows up to this width stay in the first-level cache from tile to tile. Then outputs that fill a vector, kLanes sums
// in four rows, are worth more than few loads of rows.
constexpr int64_t kShortWidth = 1024;
constexpr int kShortOutputs = 4;

// The rows, widened to fp32, zeros up to a multiple of kLanes.
struct WideRows {
  const float* data;
  int64_t stride;
  int64_t count;
};

// What is fetched into the cache while a tile is computed: the tile that comes next.
struct Fetch {
  const char* next;
  // Row tiles that share the work.
  int64_t shares;
};

// sums[r * kOutputs + j] = <x[r], weight[j]>
template <int kRows, int kOutputs, typename T>
void multiply(const float* x, int64_t x_stride, const T* weight, int64_t weight_stride, int64_t width, Fetch& fetch,
              float* results) {
  constexpr int kSums = kRows * kOutputs;
  constexpr int kGroups = (kSums + kLanes - 1) / kLanes;
  constexpr int kLinesPerStep =
      std::max<int>(1, kOutputs * kLanes * static_cast<int>(sizeof(T)) / static_cast<int>(kCacheLine));
  Vec sums[kGroups][kLanes];
#pragma GCC unroll 32
  for (int i = 0; i < kGroups * kLanes; ++i) sums[i / kLanes][i % kLanes] = broadcast(0.0f);
  int64_t until_fetch = fetch.shares;
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    Vec rows[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) rows[r] = load(x + r * x_stride + k);
#pragma GCC unroll 16
    for (int j = 0; j < kOutputs; ++j) {
      const Vec column = load(weight + j * weight_stride + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Vec& sum = sums[(r * kOutputs + j) / kLanes][(r * kOutputs + j) % kLanes];
        sum = fma(rows[r], column, sum);
      }
    }
    if (--until_fetch == 0) {
#pragma GCC unroll 16
      for (int line = 0; line < kLinesPerStep; ++line) __builtin_prefetch(fetch.next + line * kCacheLine, 0, 2);
      fetch.next += kLinesPerStep * kCacheLine;
      until_fetch = fetch.shares;
    }
  }
  if (k < width) {
    for (int j = 0; j < kOutputs; ++j) {
      float column[kLanes] = {};
      for (int64_t i = k; i < width; ++i) column[i - k] = to_float(weight[j * weight_stride + i]);
      for (int r = 0; r < kRows; ++r) {
        Vec& sum = sums[(r * kOutputs + j) / kLanes][(r * kOutputs + j) % kLanes];
        sum = fma(load(x + r * x_stride + k), load(column), sum);
      }
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) store(results + g * kLanes, horizontal_sums(sums[g]));
}

template <typename T>
class Product {
 public:
  Product(const BatchInvariantLinearArgs& args, const WideRows& x)
      : x_(x),
        weight_(static_cast<const T*>(args.weight)),
        stride_(args.weight_stride),
        bias_(static_cast<const T*>(args.bias)),
        outputs_(args.outputs),
        width_(args.width),
        output_(static_cast<T*>(args.output)) {}

  // All rows with the outputs first .. last - 1.
  void compute(int64_t first, int64_t last) const {
    const int64_t blocks = std::max<int64_t>(1, x_.count * x_.stride * static_cast<int64_t>(sizeof(float)) / kRowBytes);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = x_.count * block / blocks;
      const int64_t rows = x_.count * (block + 1) / blocks - row;
      with_count<kTileRows>(std::min<int64_t>(rows, kTileRows), [&](auto most) {
        constexpr int kOutputs = kTileOutputs[most];
        if (last - first < kOutputs) {
          multiply_rows<most, 1>(row, rows, first, last);
        } else if (most == kTileRows && width_ <= kShortWidth) {
          multiply_rows<most, kShortOutputs>(row, rows, first, last);
        } else {
          multiply_rows<most, kOutputs>(row, rows, first, last);
        }
      });
    }
  }

 private:
  // Tiles of at most kRows rows; the last tile of outputs repeats some of the one before, with the same bits.
  template <int kRows, int kOutputs>
  void multiply_rows(int64_t row, int64_t rows, int64_t first, int64_t last) const {
    const int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t n = first; n < last; n += kOutputs) {
      const int64_t output = std::min(n, last - kOutputs);
      const int64_t next = std::min(output + kOutputs, last - kOutputs);
      Fetch fetch = {reinterpret_cast<const char*>(weight_ + next * stride_), tiles};
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t begin = row + rows * tile / tiles;
        with_count<kRows>(row + rows * (tile + 1) / tiles - begin,
                          [&](auto count) { multiply_tile<count, kOutputs>(begin, output, fetch); });
      }
    }
  }

  template <int kRows, int kOutputs>
  void multiply_tile(int64_t row, int64_t output, Fetch& fetch) const {
    alignas(64) float sums[kRows * kOutputs + kLanes];
    multiply<kRows, kOutputs>(x_.data + row * x_.stride, x_.stride, weight_ + output * stride_, stride_, width_, fetch,
                              sums);
    for (int r = 0; r < kRows; ++r) {
      T* out = output_ + (row + r) * outputs_ + output;
      for (int j = 0; j < kOutputs; ++j) {
        const float sum = sums[r * kOutputs + j];
        out[j] = from_float<T>(bias_ == nullptr ? sum : sum + to_float(bias_[output + j]));
      }
    }
  }

  WideRows x_;
  const T* weight_;
  int64_t stride_;
  const T* bias_;
  int64_t outputs_;
  int64_t width_;
  T* output_;
};

template <typename T>
void run(const BatchInvariantLinearArgs& args) {
  if (args.rows == 0 || args.outputs == 0) return;
  WideRows x = {static_cast<const float*>(args.x), args.width, args.rows};
  std::unique_ptr<float[]> widened;
  if (!std::is_same_v<T, float> || args.width % kLanes != 0) {
    x.stride = (args.width + kLanes - 1) / kLanes * kLanes;
    widened.reset(new float[static_cast<size_t>(x.count * x.stride)]);
    for (int64_t r = 0; r < args.rows; ++r) {
      float* row = widened.get() + r * x.stride;
      widen(static_cast<const T*>(args.x) + r * args.width, args.width, row);
      std::fill(row + args.width, row + x.stride, 0.0f);
    }
    x.data = widened.get();
  }
  const Product<T> product(args, x);
  const int64_t blocks = std::max<int64_t>(1, args.outputs / kOutputsPerBlock);
  const int threads = thread_count(args.num_threads, blocks, args.rows * args.outputs * args.width, kMinWorkPerThread);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t first = blocks * thread / threads * kOutputsPerBlock;
    const int64_t last = thread + 1 == threads ? args.outputs : blocks * (thread + 1) / threads * kOutputsPerBlock;
    product.compute(first, last);
  }
}

}  // namespace

namespace GGRO_ISA {

void batch_invariant_linear(const BatchInvariantLinearArgs& args) {
  with_dtype(args.dtype, [&](auto type) { run<decltype(type)>(args); });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
