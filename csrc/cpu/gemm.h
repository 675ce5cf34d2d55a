#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "counts.h"
#include "simd.h"
#include "transpose.h"

// Register-blocked products of small tiles, the shared core of every op that multiplies matrices. Each output is one
// chain of multiply-adds in the order of the depth, so its bits do not depend on the tile it was computed in.
// In an unnamed namespace for the reason given in simd.h.
namespace ggro::cpu {
namespace {

// Two neighbours of a bf16 row, multiplied and added in one instruction where the processor has it. A row may begin at
// any element, so that a pair is aligned as one of its halves is.
using UnalignedBits = uint32_t __attribute__((aligned(2), may_alias));
struct BFloat16Pair {
  UnalignedBits bits;
};
static_assert(alignof(BFloat16Pair) == 2 && sizeof(BFloat16Pair) == 4);

// What a depth step consumes of a row, as kLanes of it lie in a vector: values widened to fp32, or pairs.
template <typename T>
inline Vec load_units(const T* p) {
  return load(p);
}
inline Vec load_units(const BFloat16Pair* p) { return load(reinterpret_cast<const float*>(p)); }

inline Vec multiply_add(float a, Vec b, Vec sum) { return fma(broadcast(a), b, sum); }

#if defined(__AVX512BF16__)
inline Vec multiply_add(BFloat16Pair a, Vec b, Vec sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a.bits))),
                          reinterpret_cast<__m512bh>(b));
}
#endif

// What a depth step consumes of a row of A and of one of B.
template <typename A, typename B>
struct ProductUnitOf {
  using Type = float;
};

#if defined(__AVX512BF16__)
template <>
struct ProductUnitOf<BFloat16, BFloat16> {
  using Type = BFloat16Pair;
};
#endif

template <typename A, typename B>
using ProductUnit = typename ProductUnitOf<A, B>::Type;

constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;

// As many rows as leave their sums, two vectors of b and one of a in registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif

template <int kRows, typename Unit, typename B>
inline void multiply_rows(const Unit* a, int64_t a_row_stride, int64_t a_depth_stride, const B* b, int64_t b_stride,
                          int64_t depth, float* out, int64_t out_stride, bool accumulate) {
  Vec sums[kRows][kTileVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) sums[r][v] = broadcast(0.0f);
  }
  for (int64_t i = 0; i < depth; ++i) {
    Vec columns[kTileVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) columns[v] = load_units(b + i * b_stride + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Unit element = a[r * a_row_stride + i * a_depth_stride];
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = multiply_add(element, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      float* o = out + r * out_stride + v * kLanes;
      store(o, accumulate ? add(load(o), sums[r][v]) : sums[r][v]);
    }
  }
}

// out[r, j] (+)= sum over i of a[r, i] b[i, j] for r < rows <= kTileRows and j < kTileColumns: the sum starts from zero
// and is added to what `out` holds if `accumulate`.
// a: rows of depth units. b: depth rows of kTileColumns units, or of values of any dtype where `a` is fp32. Strides in
// units, those of `out` in floats.
template <typename Unit, typename B>
void multiply_tile(const Unit* a, int64_t a_stride, int rows, const B* b, int64_t b_stride, int64_t depth, float* out,
                   int64_t out_stride, bool accumulate) {
  with_count<kTileRows>(
      rows, [&](auto count) { multiply_rows<count>(a, a_stride, 1, b, b_stride, depth, out, out_stride, accumulate); });
}

// As multiply_tile, with `a` packed by pack_transposed: unit r of depth step i at a[i * kTileRows + r], and b packed
// with kTileColumns.
template <typename Unit>
void multiply_packed_tile(const Unit* a, int rows, const Unit* b, int64_t depth, float* out, int64_t out_stride,
                          bool accumulate) {
  with_count<kTileRows>(rows, [&](auto count) {
    multiply_rows<count>(a, 1, kTileRows, b, kTileColumns, depth, out, out_stride, accumulate);
  });
}

template <typename Unit>
constexpr int64_t kElementsPerUnit = std::is_same_v<Unit, BFloat16Pair> ? 2 : 1;

template <typename Unit>
int64_t count_units(int64_t elements) {
  return (elements + kElementsPerUnit<Unit> - 1) / kElementsPerUnit<Unit>;
}

// How a row of T is read as units: fp32 values, or the pairs that its bf16 values lie in.
template <typename T>
inline Vec load_row_units(const T* row, int64_t unit, float) {
  return load(row + unit);
}
template <typename T>
inline Vec load_row_units(const T* row, int64_t unit, BFloat16Pair) {
  return load(reinterpret_cast<const float*>(row) + unit);
}
template <typename T>
inline float load_unit(const T* row, int64_t unit, int64_t, float) {
  return to_float(row[unit]);
}
template <typename T>
inline BFloat16Pair load_unit(const T* row, int64_t unit, int64_t width, BFloat16Pair) {
  BFloat16Pair pair = {row[2 * unit].bits};
  if (2 * unit + 1 < width) pair.bits |= static_cast<uint32_t>(row[2 * unit + 1].bits) << 16;
  return pair;
}

// packed[i * packed_stride + j] = unit i of row j, for j < rows and first units of `width` elements.
// kGroups vectors are written for every unit, in the order of units: what exceeds packed_stride is overwritten by the
// next unit, and the last one needs room for it. Lanes beyond `rows` repeat the last row.
template <int kGroups, typename Unit, typename T>
void pack_transposed(const T* x, int64_t stride, int64_t rows, int64_t width, Unit* packed, int64_t packed_stride) {
  const int64_t units = count_units<Unit>(width);
  for (int g = 0; g < kGroups; ++g) {
    const T* group[kLanes];
    for (int j = 0; j < kLanes; ++j) group[j] = x + std::min<int64_t>(g * kLanes + j, rows - 1) * stride;
    int64_t i = 0;
    for (; (i + kLanes) * kElementsPerUnit<Unit> <= width; i += kLanes) {
      Vec tile[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) tile[j] = load_row_units(group[j], i, Unit());
      transpose(tile);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        store(reinterpret_cast<float*>(packed + (i + j) * packed_stride + g * kLanes), tile[j]);
      }
    }
    for (; i < units; ++i) {
      for (int64_t j = 0; j < std::min<int64_t>(packed_stride - g * kLanes, kLanes); ++j) {
        packed[i * packed_stride + g * kLanes + j] = load_unit(group[j], i, width, Unit());
      }
    }
  }
}

// out[r, j] = sum over units i of a[r, i] times unit i of row j of x, for r < kRows and j < kLanes, as multiply_tile
// gives them from x packed by pack_transposed, bit by bit. Columns beyond `rows` repeat the last row.
template <int kRows, typename Unit, typename T>
void multiply_transposed(const Unit* a, int64_t a_stride, const T* x, int64_t stride, int64_t rows, int64_t width,
                         float* out, int64_t out_stride) {
  const int64_t units = count_units<Unit>(width);
  const T* row_pointers[kLanes];
  for (int j = 0; j < kLanes; ++j) row_pointers[j] = x + std::min<int64_t>(j, rows - 1) * stride;
  Vec sums[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r] = broadcast(0.0f);
  int64_t i = 0;
  for (; (i + kLanes) * kElementsPerUnit<Unit> <= width; i += kLanes) {
    Vec tile[kLanes];
    for (int j = 0; j < kLanes; ++j) tile[j] = load_row_units(row_pointers[j], i, Unit());
    transpose(tile);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r] = multiply_add(a[r * a_stride + i + j], tile[j], sums[r]);
    }
  }
  for (; i < units; ++i) {
    Unit column[kLanes];
    for (int j = 0; j < kLanes; ++j) column[j] = load_unit(row_pointers[j], i, width, Unit());
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r] = multiply_add(a[r * a_stride + i], load_units(column), sums[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) store(out + r * out_stride, sums[r]);
}

}  // namespace
}  // namespace ggro::cpu
