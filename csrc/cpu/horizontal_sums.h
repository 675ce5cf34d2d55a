#pragma once

#include "simd.h"
#include "transpose.h"

// In an unnamed namespace for the reason given in simd.h.
namespace ggro::cpu {
namespace {

// Lane i: horizontal_sum(x[i]), bit by bit.
#if defined(__AVX512F__)

// Half of what a transposition would shuffle: vectors share a register as soon as half of one is enough.
inline Vec horizontal_sums(const Vec (&x)[kLanes]) {
  Vec halves[8];
  Vec quarters[4];
  for (int g = 0; g < 4; ++g) {
    for (int i = 0; i < 2; ++i) {
      const Vec a = x[g + 8 * i];
      const Vec b = x[g + 8 * i + 4];
      halves[2 * g + i] = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    const Vec a = halves[2 * g];
    const Vec b = halves[2 * g + 1];
    quarters[g] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  // Lanes 4 c .. 4 c + 3 of quarters[g] belong to x[4 c + g].
  Vec pairs[2];
  for (int i = 0; i < 2; ++i) {
    const __m512d a = _mm512_castps_pd(quarters[2 * i]);
    const __m512d b = _mm512_castps_pd(quarters[2 * i + 1]);
    pairs[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  return add(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd));
}

#else

inline Vec horizontal_sums(const Vec (&x)[kLanes]) {
  Vec lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = x[i];
  transpose(lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = add(lanes[i], lanes[i + width]);
  }
  return lanes[0];
}

#endif

}  // namespace
}  // namespace ggro::cpu
