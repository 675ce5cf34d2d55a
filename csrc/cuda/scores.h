#pragma once

#include "logits.h"
#include "portable.h"

// scores[r, v] = <vectors[r], table[first_column + v]> for a slab of a table, in fp32: products of our own rather than
// the library's, whose kernels, and with them the bits of a score, depend on how many vectors there are.
//
// A block computes a tile of scores. Blocks of the same columns are neighbours: the first to read them brings them into
// the cache for all. Sums go along the width in an order that depends on nothing else.

namespace ggro::cuda {

struct ScoresArgs {
  const void* vectors;
  int64_t vector_stride;
  const void* table;  // its row first_column
  int64_t table_stride;
  int64_t rows;
  int64_t columns;
  int64_t width;
  const float* bias;      // of these columns, or null
  const bool* forbidden;  // of these columns, or null
  float softcap;          // 0: none
  float* scores;          // [rows, columns] with
  int64_t scores_stride;
};

// What becomes of a product.
GGRO_DEVICE void store_score(const ScoresArgs& args, int64_t row, int64_t column, float score) {
  if (row >= args.rows || column >= args.columns) return;
  if (args.bias != nullptr) score += args.bias[column];
  if (args.softcap != 0.0f) score = args.softcap * tanhf(score / args.softcap);
  if (args.forbidden != nullptr && args.forbidden[column]) score = -INFINITY;
  args.scores[row * args.scores_stride + column] = score;
}

// Eight elements of a row; zeros outside of it.
template <typename T>
GGRO_DEVICE Vector<T, 8> load_some(const T* row, bool exists, int64_t first, int64_t width) {
  Vector<T, 8> vector;
#pragma unroll
  for (int i = 0; i < 8; ++i) vector.data[i] = exists && first + i < width ? row[first + i] : T{};
  return vector;
}

// Two bytes an element, both of them T: by the tensor cores.
template <typename T>
struct HalfScoresKernel {
  using Args = ScoresArgs;
  static constexpr int kThreads = 256;
  static constexpr int kRows = 64, kColumns = 128, kDepth = 64, kStages = 3;
  // So that the eight rows of a fragment lie in different banks.
  static constexpr int kPitch = kDepth + 8;
  static constexpr int kSharedBytes = shared_bytes_of<T>(kStages * (kRows + kColumns) * kPitch);

  static GGRO_DEVICE void run(Thread& thread, const Args& args) {
    const Shared<T> tiles = thread.shared<T>(kStages * (kRows + kColumns) * kPitch);
    const int64_t row_tiles = divide_up(args.rows, kRows);
    const int64_t first_row = thread.block() % row_tiles * kRows, first_column = thread.block() / row_tiles * kColumns;
    const int64_t steps = divide_up(args.width, kDepth);

    // A warp has 32 x 32 of the tile: 2 x 4 products of 16 x 8.
    const int warp_row = thread.warp() % 2 * 32, warp_column = thread.warp() / 2 * 32;
    float sums[2][4][4] = {};
    for (int step = 0; step < kStages - 1; ++step) begin_copies(thread, args, tiles, first_row, first_column, step);
    for (int64_t step = 0; step < steps; ++step) {
      thread.template wait_for_copies<kStages - 2>();
      // All copies of this step are there, and nobody reads the tiles of the one before any more.
      thread.sync();
      begin_copies(thread, args, tiles, first_row, first_column, step + kStages - 1);
      const int vectors = static_cast<int>(step % kStages) * (kRows + kColumns) * kPitch;
      add_products(thread, tiles, vectors + warp_row * kPitch, vectors + (kRows + warp_column) * kPitch, sums);
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int64_t row = first_row + warp_row + i * 16 + c / 2 * 8 + thread.lane() / 4;
          const int64_t column = first_column + warp_column + j * 8 + thread.lane() % 4 * 2 + c % 2;
          store_score(args, row, column, sums[i][j][c]);
        }
      }
    }
  }

 private:
  static GGRO_DEVICE void begin_copies(const Thread& thread, const Args& args, const Shared<T>& tiles,
                                       int64_t first_row, int64_t first_column, int64_t step) {
    constexpr int kVectors = kDepth / 8;
    const int stage = static_cast<int>(step % kStages) * (kRows + kColumns);
    for (int i = thread.index(); i < (kRows + kColumns) * kVectors; i += kThreads) {
      const int tile_row = i / kVectors;
      const int64_t first = step * kDepth + i % kVectors * 8;
      const bool of_vectors = tile_row < kRows;
      const int64_t row = of_vectors ? first_row + tile_row : first_column + tile_row - kRows;
      const bool exists = row < (of_vectors ? args.rows : args.columns);
      const T* source = static_cast<const T*>(of_vectors ? args.vectors : args.table) +
                        row * (of_vectors ? args.vector_stride : args.table_stride);
      const int target = (stage + tile_row) * kPitch + i % kVectors * 8;
      if (exists && first + 8 <= args.width && reinterpret_cast<uintptr_t>(source + first) % 16 == 0) {
        tiles.copy_async(target, source + first);
      } else {
        tiles.template store_vector<8>(target, load_some(source, exists, first, args.width));
      }
    }
    thread.commit_copies();
  }

  static GGRO_DEVICE void add_products(const Thread& thread, const Shared<T>& tiles, int vectors, int columns,
                                       float (&sums)[2][4][4]) {
    // Where the row of a matrix begins that this lane loads: of vectors, two below each other and their right
    // neighbours; of columns, one, its right neighbour, and the two below.
    const int lane = thread.lane();
    const int vector_place = vectors + lane % 16 * kPitch + lane / 16 * 8;
    const int column_place = columns + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
    // Tensor cores truncate as they add: short chains only, the rest in rounded additions.
    float products[2][4][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) thread.template load_matrices<false>(tiles, vector_place + i * 16 * kPitch + k, a[i]);
#pragma unroll
      for (int j = 0; j < 2; ++j) thread.template load_matrices<false>(tiles, column_place + j * 16 * kPitch + k, b[j]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          thread.template multiply_add_16x8x16<T>(products[i][j], a[i], {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[i][j][c] += products[i][j][c];
      }
    }
  }
};

// fp32, or elements of two types: by fused multiply-adds.
template <typename A, typename B>
struct FloatScoresKernel {
  using Args = ScoresArgs;
  static constexpr int kThreads = 256;
  static constexpr int kRows = 16, kColumns = 128, kDepth = 32;
  static constexpr int kThreadRows = 2, kThreadColumns = 4;
  static constexpr int kRowPitch = kRows + 4, kColumnPitch = kColumns + 4;
  static constexpr int kSharedBytes =
      shared_bytes_of<float>(kDepth * kRowPitch) + shared_bytes_of<float>(kDepth * kColumnPitch);

  static GGRO_DEVICE void run(Thread& thread, const Args& args) {
    // Along the rows of a tile lie vectors, or columns: what a thread multiplies is one load.
    const Shared<float> vectors = thread.shared<float>(kDepth * kRowPitch);
    const Shared<float> columns = thread.shared<float>(kDepth * kColumnPitch);
    const int64_t row_tiles = divide_up(args.rows, kRows);
    const int64_t first_row = thread.block() % row_tiles * kRows, first_column = thread.block() / row_tiles * kColumns;
    const int row = thread.index() / (kColumns / kThreadColumns) * kThreadRows;
    const int column = thread.index() % (kColumns / kThreadColumns) * kThreadColumns;

    float sums[kThreadRows][kThreadColumns] = {};
    for (int64_t first = 0; first < args.width; first += kDepth) {
      thread.sync();
      transpose<A, kRows, kRowPitch>(thread, static_cast<const A*>(args.vectors), args.vector_stride, first_row,
                                     args.rows, first, args.width, vectors);
      transpose<B, kColumns, kColumnPitch>(thread, static_cast<const B*>(args.table), args.table_stride, first_column,
                                           args.columns, first, args.width, columns);
      thread.sync();
      // Short chains: the error of a sum grows with its length.
      float products[kThreadRows][kThreadColumns] = {};
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        const auto a = vectors.template load_vector<kThreadRows>(k * kRowPitch + row);
        const auto b = columns.template load_vector<kThreadColumns>(k * kColumnPitch + column);
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
          for (int j = 0; j < kThreadColumns; ++j) products[i][j] = fmaf(a.data[i], b.data[j], products[i][j]);
        }
      }
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) sums[i][j] += products[i][j];
      }
    }
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j)
        store_score(args, first_row + row + i, first_column + column + j, sums[i][j]);
    }
  }

 private:
  // tile[k, r] = rows[first_row + r, first + k], zeros outside; by 16-byte loads where a row allows them.
  template <typename T, int kTileRows, int kPitch>
  static GGRO_DEVICE void transpose(const Thread& thread, const T* rows, int64_t stride, int64_t first_row,
                                    int64_t row_count, int64_t first, int64_t width, const Shared<float>& tile) {
    constexpr int kWidth = 16 / sizeof(T), kVectors = kDepth / kWidth;
    for (int i = thread.index(); i < kTileRows * kVectors; i += kThreads) {
      // Neighbours have neighbouring rows, and with them neighbouring banks.
      const int r = i % kTileRows, k = i / kTileRows * kWidth;
      const bool exists = first_row + r < row_count;
      const T* source = rows + (first_row + r) * stride + first + k;
      float x[kWidth];
      if (exists && first + k + kWidth <= width && reinterpret_cast<uintptr_t>(source) % 16 == 0) {
        const auto vector = load_vector<T, kWidth>(source);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) x[j] = to_float(vector.data[j]);
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) x[j] = exists && first + k + j < width ? to_float(source[j]) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) tile.store((k + j) * kPitch + r, x[j]);
    }
  }
};

}  // namespace ggro::cuda
