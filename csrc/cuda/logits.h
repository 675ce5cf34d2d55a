#pragma once

#include "portable.h"

namespace ggro::cuda {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// W logits as fp32 from 16 bytes that begin anywhere: two aligned loads, of which the neighbours' hit the cache, and
// what lies between. Reads up to 15 bytes before and after.
template <typename T, int W>
GGRO_DEVICE void load_unaligned(const T* source, float (&x)[W]) {
  const int offset = static_cast<int>(reinterpret_cast<uintptr_t>(source) % 16);
  const auto* words = reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(source) - offset);
  const Vector<uint32_t, 4> low = load_vector<uint32_t, 4>(words), high = load_vector<uint32_t, 4>(words + 4);
  uint32_t word[8];
  for (int i = 0; i < 4; ++i) {
    word[i] = low.data[i];
    word[4 + i] = high.data[i];
  }
  // Registers have no index: a shift by two words, by one, then by bytes.
  for (int i = 0; i < 6; ++i) word[i] = offset & 8 ? word[i + 2] : word[i];
  for (int i = 0; i < 5; ++i) word[i] = offset & 4 ? word[i + 1] : word[i];
  for (int i = 0; i < 4; ++i) word[i] = shifted_word(word[i], word[i + 1], offset & 3);
  for (int i = 0; i < W; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = float_of(word[i]);
    } else {
      x[i] = to_float(T{static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2)))});
    }
  }
}

// Columns of a row that are loaded together: a lane's N times W of them, kept apart by `step`, from `column` on.
struct Span {
  int64_t first;
  int64_t last;
  int64_t column;
  int step;
};

// Logits as fp32; -inf beyond the end of the row. How they are loaded is decided once, so that all loads go out before
// the first is waited for.
template <typename T, int N, int W>
GGRO_DEVICE void load_logits(const T* row, int64_t columns, const Span& span, float (&x)[N][W]) {
  const T* source = row + span.column;
  if (reinterpret_cast<uintptr_t>(row + span.first) % 16 == 0 && span.last <= columns) {
    Vector<T, W> vectors[N];
#pragma unroll
    for (int n = 0; n < N; ++n) vectors[n] = load_vector<T, W>(source + n * span.step);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < W; ++i) x[n][i] = to_float(vectors[n].data[i]);
    }
  } else if (span.first >= W && span.last + W <= columns) {
#pragma unroll
    for (int n = 0; n < N; ++n) load_unaligned<T, W>(source + n * span.step, x[n]);
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < W; ++i) {
        x[n][i] = span.column + n * span.step + i < columns ? to_float(source[n * span.step + i]) : -INFINITY;
      }
    }
  }
}

}  // namespace ggro::cuda
