#pragma once

#include "portable.h"

namespace ggro::cuda {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The W consecutive logits of a lane, as fp32; -inf beyond the end of the row.
template <typename T, int W>
GGRO_DEVICE void load_logits(const T* row, int64_t column, int64_t columns, float (&x)[W]) {
  const T* source = row + column;
  const int offset = static_cast<int>(reinterpret_cast<uintptr_t>(source) % 16);
  if (offset == 0 && column + W <= columns) {
    const Vector<T, W> vector = load_vector<T, W>(source);
    for (int i = 0; i < W; ++i) x[i] = to_float(vector.data[i]);
  } else if (column >= W && column + 2 * W <= columns) {
    // A row that begins anywhere: two aligned loads, of which the neighbours' hit the cache, and what lies between.
    const auto* words = reinterpret_cast<const uint32_t*>(reinterpret_cast<uintptr_t>(source) - offset);
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
  } else {
    for (int i = 0; i < W; ++i) x[i] = column + i < columns ? to_float(source[i]) : -INFINITY;
  }
}

}  // namespace ggro::cuda
