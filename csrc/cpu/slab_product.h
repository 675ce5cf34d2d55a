#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "counts.h"
#include "gemm.h"
#include "simd.h"

// Products of a few rows with a long table, one slab of table rows at a time: the [rows, vocab] matrix never exists.
// In an unnamed namespace for the reason given in simd.h.
namespace ggro::cpu {
namespace {

// Table rows of a slab. Long enough that packing the other matrix again for every slab costs little.
constexpr int64_t kSlab = 512;

// Units of depth that are summed in one chain from zero, which is then added to the chains before it.
// Errors of terms of one sign grow with it. Pairs of bf16, products of inputs that are themselves good to 1/256 only,
// take longer chains, which make fewer passes over the sums.
template <typename Unit>
constexpr int64_t kDepthChunk = std::is_same_v<Unit, BFloat16Pair> ? 512 : 128;

// Up to so many rows the table is transposed in registers and never packed: its reading is all that counts.
constexpr int64_t kDirectRows = 24;

// Rows that are multiplied at once: more of them take turns, which bounds the memory for their scores.
constexpr int64_t kMaxRows = 1024;

template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t count;
};

inline int64_t slab_count(int64_t table_rows) { return (table_rows + kSlab - 1) / kSlab; }

// One thread's products of a [rows, width], rows <= kMaxRows, with slabs of table [vocab, width].
// The bits of a product depend on the two rows and the instruction set only: the order of summation is that of the
// depth, in chains of kDepthChunk, on every path.
template <typename A, typename B>
class SlabProduct {
  using Unit = ProductUnit<A, B>;

 public:
  SlabProduct(const Rows<A>& a, const Rows<B>& table, int64_t width)
      : a_(a.data),
        a_stride_(a.stride),
        rows_(a.count),
        table_(table.data),
        table_stride_(table.stride),
        width_(width),
        scores_(new float[a.count * kSlab]) {
    if (rows_ <= kDirectRows) return;
    tiles_ = (rows_ + kTileRows - 1) / kTileRows;
    packed_a_.reset(new Unit[tiles_ * kPackedRows]);
    packed_table_.reset(new Unit[kDepthChunk<Unit> * kTileColumns]);
  }

  // The scores [rows, kSlab] <a[r], table[first + j]> for j < columns <= kSlab, undefined beyond; valid until the next.
  float* multiply(int64_t first, int64_t columns) {
    float* out = scores_.get();
    const B* slab = table_ + first * table_stride_;
    if (width_ == 0) std::fill(out, out + rows_ * kSlab, 0.0f);
    if (rows_ <= kDirectRows) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        multiply_columns(slab + j * table_stride_, std::min<int64_t>(kLanes, columns - j), out + j);
      }
      return out;
    }
    for (int64_t depth = 0; depth < width_; depth += kChunkElements) {
      const int64_t chunk = std::min(kChunkElements, width_ - depth);
      for (int64_t t = 0; t < tiles_; ++t) {
        pack_transposed<kPackGroups>(a_ + tile_first(t) * a_stride_ + depth, a_stride_, tile_rows(t), chunk,
                                     packed_a_.get() + t * kPackedRows, kTileRows);
      }
      for (int64_t j = 0; j < columns; j += kTileColumns) {
        pack_transposed<kTileVectors>(slab + j * table_stride_ + depth, table_stride_,
                                      std::min<int64_t>(kTileColumns, columns - j), chunk, packed_table_.get(),
                                      kTileColumns);
        for (int64_t t = 0; t < tiles_; ++t) {
          multiply_packed_tile(packed_a_.get() + t * kPackedRows, static_cast<int>(tile_rows(t)), packed_table_.get(),
                               count_units<Unit>(chunk), out + tile_first(t) * kSlab + j, kSlab, depth > 0);
        }
      }
    }
    return out;
  }

 private:
  static constexpr int64_t kChunkElements = kDepthChunk<Unit> * kElementsPerUnit<Unit>;
  static constexpr int kPackGroups = (kTileRows + kLanes - 1) / kLanes;
  // pack_transposed writes whole vectors, beyond the last unit too.
  static constexpr int64_t kPackedRows = kDepthChunk<Unit> * kTileRows + kPackGroups * kLanes;

  int64_t tile_first(int64_t tile) const { return rows_ * tile / tiles_; }
  int64_t tile_rows(int64_t tile) const { return tile_first(tile + 1) - tile_first(tile); }

  // kLanes table rows x with all rows of a, transposing in registers.
  void multiply_columns(const B* x, int64_t columns, float* out) const {
    const B* table_rows[kLanes];
    for (int j = 0; j < kLanes; ++j) table_rows[j] = x + std::min<int64_t>(j, columns - 1) * table_stride_;
    alignas(64) float sums[kDirectRows * kLanes];
    for (int64_t depth = 0; depth < width_; depth += kChunkElements) {
      const int64_t chunk = std::min(kChunkElements, width_ - depth);
      std::fill(sums, sums + rows_ * kLanes, 0.0f);
      int64_t i = 0;
      for (; (i + kLanes) * kElementsPerUnit<Unit> <= chunk; i += kLanes) {
        // At the end of these rows, the beginning of those that come next.
        const int64_t ahead = depth + i * kElementsPerUnit<Unit> + kFetchAhead;
        const int64_t fetched = ahead < width_ ? ahead : kLanes * table_stride_ + ahead - width_;
        Vec tile[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) {
          tile[j] = load_row_units(table_rows[j] + depth, i, Unit());
          __builtin_prefetch(table_rows[j] + fetched, 0, 2);
        }
        transpose(tile);
        for (int64_t r = 0; r < rows_; r += kGroupRows) {
          multiply_group(tile, r, depth, i, std::min(kGroupRows, rows_ - r), sums + r * kLanes);
        }
      }
      for (; i < count_units<Unit>(chunk); ++i) {
        Unit column[kLanes];
        for (int j = 0; j < kLanes; ++j) column[j] = load_unit(table_rows[j] + depth, i, chunk, Unit());
        for (int64_t r = 0; r < rows_; ++r) {
          const Unit element = load_unit(a_ + r * a_stride_ + depth, i, chunk, Unit());
          store(sums + r * kLanes, multiply_add(element, load_units(column), load(sums + r * kLanes)));
        }
      }
      for (int64_t r = 0; r < rows_; ++r) {
        float* o = out + r * kSlab;
        const Vec sum = load(sums + r * kLanes);
        store(o, depth > 0 ? add(load(o), sum) : sum);
      }
    }
  }

  // kLanes depth steps of `rows` rows of a, from `row` on, with the transposed tile.
  void multiply_group(const Vec (&tile)[kLanes], int64_t row, int64_t depth, int64_t unit, int64_t rows,
                      float* sums) const {
    with_count<kGroupRows>(rows, [&](auto count) { multiply_group<count>(tile, row, depth, unit, sums); });
  }

  template <int kRows>
  void multiply_group(const Vec (&tile)[kLanes], int64_t row, int64_t depth, int64_t unit, float* sums) const {
    Vec vectors[kRows];
    const Unit* elements[kRows];
    // fp32 rows and pairs of bf16 are read where they lie.
    constexpr bool kInPlace = sizeof(A) * kElementsPerUnit<Unit> == sizeof(Unit);
    Unit widened[kInPlace ? 1 : kRows][kLanes];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      vectors[r] = load(sums + r * kLanes);
      const A* a = a_ + (row + r) * a_stride_ + depth;
      if constexpr (kInPlace) {
        elements[r] = reinterpret_cast<const Unit*>(a) + unit;
      } else {
        store(reinterpret_cast<float*>(widened[r]), load_row_units(a, unit, Unit()));
        elements[r] = widened[r];
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) vectors[r] = multiply_add(elements[r][j], tile[j], vectors[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) store(sums + r * kLanes, vectors[r]);
  }

  // Rows of a whose sums stay in registers beside the tile.
  static constexpr int64_t kGroupRows = 8;

  // Elements of a table row fetched into the cache ahead of those that are read.
  static constexpr int64_t kFetchAhead = 512 / static_cast<int64_t>(sizeof(B));

  const A* a_;
  int64_t a_stride_;
  int64_t rows_;
  const B* table_;
  int64_t table_stride_;
  int64_t width_;
  int64_t tiles_ = 0;
  std::unique_ptr<float[]> scores_;
  std::unique_ptr<Unit[]> packed_a_;
  std::unique_ptr<Unit[]> packed_table_;
};

}  // namespace
}  // namespace ggro::cpu
