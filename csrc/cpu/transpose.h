#pragma once

#include "simd.h"

// Transposition of kLanes x kLanes tiles of 32-bit units. In an unnamed namespace for the reason given in simd.h.
namespace ggro::cpu {
namespace {

#if defined(__AVX512F__)

inline void transpose(Vec (&rows)[kLanes]) {
  Vec pairs[kLanes];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(pairs[i + j]);
      const __m512d high = _mm512_castps_pd(pairs[i + j + 2]);
      rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // rows[4 g + c] now holds column 4 l + c of source rows 4 g .. 4 g + 3 in its 128-bit lane l.
  for (int c = 0; c < 4; ++c) {
    const Vec even01 = _mm512_shuffle_f32x4(rows[c], rows[4 + c], 0x88);
    const Vec odd01 = _mm512_shuffle_f32x4(rows[c], rows[4 + c], 0xdd);
    const Vec even23 = _mm512_shuffle_f32x4(rows[8 + c], rows[12 + c], 0x88);
    const Vec odd23 = _mm512_shuffle_f32x4(rows[8 + c], rows[12 + c], 0xdd);
    pairs[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    pairs[8 + c] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    pairs[4 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    pairs[12 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) rows[i] = pairs[i];
}

#elif defined(__AVX2__)

inline void transpose(Vec (&rows)[kLanes]) {
  Vec pairs[kLanes];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      rows[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  }
  for (int c = 0; c < 4; ++c) {
    pairs[c] = _mm256_permute2f128_ps(rows[c], rows[4 + c], 0x20);
    pairs[4 + c] = _mm256_permute2f128_ps(rows[c], rows[4 + c], 0x31);
  }
  for (int i = 0; i < 8; ++i) rows[i] = pairs[i];
}

#else

inline void transpose(Vec (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float above = rows[j][i];
      rows[j][i] = rows[i][j];
      rows[i][j] = above;
    }
  }
}

#endif

}  // namespace
}  // namespace ggro::cpu
