#pragma once

#include "portable.h"

namespace ggro::cuda {

constexpr int kDotWidth = 8;

// Eight consecutive elements as fp32, zeros from `width` on; by loads of 16 bytes where the row allows them.
template <typename T>
GGRO_DEVICE void load_eight(const T* row, int64_t first, int64_t width, bool aligned, float (&x)[kDotWidth]) {
  if (aligned && first + kDotWidth <= width) {
    constexpr int kPerLoad = 16 / sizeof(T);
    for (int i = 0; i < kDotWidth; i += kPerLoad) {
      const Vector<T, kPerLoad> vector = load_vector<T, kPerLoad>(row + first + i);
      for (int j = 0; j < kPerLoad; ++j) x[i + j] = to_float(vector.data[j]);
    }
  } else {
    for (int i = 0; i < kDotWidth; ++i) x[i] = first + i < width ? to_float(row[first + i]) : 0.0f;
  }
}

// <a, b> by a warp, in fp32 and in an order that depends on the width only; the same in all lanes.
template <typename A, typename B>
GGRO_DEVICE float warp_dot(const Thread& thread, const A* a, const B* b, int64_t width) {
  const bool a_aligned = reinterpret_cast<uintptr_t>(a) % 16 == 0, b_aligned = reinterpret_cast<uintptr_t>(b) % 16 == 0;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t first = thread.lane() * kDotWidth; first < width; first += 32 * kDotWidth) {
    float x[kDotWidth], y[kDotWidth];
    load_eight(a, first, width, a_aligned, x);
    load_eight(b, first, width, b_aligned, y);
    for (int i = 0; i < kDotWidth; ++i) sum = fmaf(x[i], y[i], sum);
  }
  for (int mask = 16; mask > 0; mask /= 2) sum += thread.shuffle_xor(sum, mask);
  return sum;
}

}  // namespace ggro::cuda
