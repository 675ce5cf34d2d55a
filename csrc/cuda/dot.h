#pragma once

#include "portable.h"
#include "warp.h"

namespace ggro::cuda {

// Consecutive elements of a lane.
constexpr int kDotWidth = 8;

// kDotWidth elements as fp32, by loads of 16 bytes.
template <typename T>
GGRO_DEVICE void load_aligned(const T* source, float (&x)[kDotWidth]) {
  constexpr int kPerLoad = 16 / sizeof(T);
  for (int i = 0; i < kDotWidth; i += kPerLoad) {
    const Vector<T, kPerLoad> vector = load_vector<T, kPerLoad>(source + i);
    for (int j = 0; j < kPerLoad; ++j) x[i + j] = to_float(vector.data[j]);
  }
}

// <a, b> by a warp, in fp32 and in an order that depends on the width only; the same in all lanes.
template <typename A, typename B>
GGRO_DEVICE float warp_dot(const Thread& thread, const A* a, const B* b, int64_t width) {
  float sum = 0.0f;
  int64_t first = thread.lane() * kDotWidth;
  if ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0) {
#pragma unroll 4
    for (; first + kDotWidth <= width; first += 32 * kDotWidth) {
      float x[kDotWidth], y[kDotWidth];
      load_aligned(a + first, x);
      load_aligned(b + first, y);
      for (int i = 0; i < kDotWidth; ++i) sum = fmaf(x[i], y[i], sum);
    }
  }
  // The end of a row, or all of one that begins anywhere.
  for (; first < width; first += 32 * kDotWidth) {
    for (int64_t i = first; i < first + kDotWidth && i < width; ++i) sum = fmaf(to_float(a[i]), to_float(b[i]), sum);
  }
  return sum_of_lanes(thread, sum);
}

}  // namespace ggro::cuda
