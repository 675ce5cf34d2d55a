#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "ggro/types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// One vector of fp32 lanes for whichever instruction set this translation unit is compiled for.
// Everything is in an unnamed namespace: an inline function shared by name between translation units of different
// instruction sets could be resolved by the linker to the copy that the processor cannot run.
namespace ggro::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <typename T>
constexpr T kLog2E = static_cast<T>(1.4426950408889634);

// Bytes that a prefetch brings in.
constexpr size_t kCacheLine = 64;

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

inline float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide_exponent = exponent == 31 ? 255u : exponent + 112u;
  const uint32_t bits = sign | (wide_exponent << 23) | (mantissa << 13);
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// Element i of an array whose type is known at run time only.
inline float to_float(const void* x, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(x)[i];
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(x)[i]);
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(x)[i]);
  }
  return 0.0f;
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vec = __m512;

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Vec load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Gives b where either is NaN.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
// One bit per lane: set where x > y or either is NaN.
inline uint32_t not_less_equal(Vec x, Vec y) { return _mm512_cmp_ps_mask(x, y, _CMP_NLE_UQ); }
// a < b ? x : y in every lane.
inline Vec blend_less(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Vec = __m256;

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Vec load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline uint32_t not_less_equal(Vec x, Vec y) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_NLE_UQ)));
}
inline Vec blend_less(Vec a, Vec b, Vec x, Vec y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }

#else

// Four lanes in the compiler's own vector type: SSE2 on x86-64, NEON on aarch64.
constexpr int kLanes = 4;
using Vec = float __attribute__((vector_size(16)));
using IntVec = int32_t __attribute__((vector_size(16)));

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <typename T>
inline Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }
inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline uint32_t not_less_equal(Vec x, Vec y) {
  const IntVec comparison = x <= y;
  // Subscripts of a vector come out wrong in GCC 12's undefined behaviour sanitizer.
  int32_t rejected[kLanes];
  std::memcpy(rejected, &comparison, sizeof(rejected));
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (rejected[i] == 0 ? 1u : 0u) << i;
  return mask;
}
inline Vec blend_less(Vec a, Vec b, Vec x, Vec y) { return a < b ? x : y; }

#endif

template <typename T>
inline void widen(const T* x, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(out + i, load(x + i));
  for (; i < width; ++i) out[i] = to_float(x[i]);
}

// 2^z for z <= 0 or NaN, relative error below 2e-7, exactly 1 at 0 and exactly 0 at kExp2Floor.
// Below kExp2Floor the result is undefined. Polynomials of degree 5, minimax in relative error with p(0) = 1.
#if defined(__AVX512F__)

constexpr float kExp2Floor = -160.0f;

inline Vec exp2_nonpositive(Vec z) {
  // z - floor(z), in [0, 1); scalef multiplies by 2^floor(z).
  const Vec fraction = _mm512_reduce_ps(z, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = broadcast(0.0018671300495043397f);
  p = fma(p, fraction, broadcast(0.009017030708491802f));
  p = fma(p, fraction, broadcast(0.05579991266131401f));
  p = fma(p, fraction, broadcast(0.24016444385051727f));
  p = fma(p, fraction, broadcast(0.6931512951850891f));
  p = fma(p, fraction, broadcast(1.0f));
  return _mm512_scalef_ps(p, z);
}

#else

constexpr float kExp2Floor = -127.0f;

// 2^n where rounded = n + 1.5 * 2^23: the low bits of that float are n, and the shift drops the others.
inline Vec power_of_two(Vec rounded) {
#if defined(__AVX2__)
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(rounded), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(127 << 23)));
#else
  using UintVec = uint32_t __attribute__((vector_size(16)));
  UintVec bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits << 23) + (127u << 23);
  Vec power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
#endif
}

inline Vec exp2_nonpositive(Vec z) {
  const Vec shift = broadcast(12582912.0f);
  const Vec rounded = add(z, shift);
  const Vec fraction = sub(z, sub(rounded, shift));
  Vec p = broadcast(0.001326472731307149f);
  p = fma(p, fraction, broadcast(0.009671512991189957f));
  p = fma(p, fraction, broadcast(0.05550733581185341f));
  p = fma(p, fraction, broadcast(0.24022242426872253f));
  p = fma(p, fraction, broadcast(0.6931470036506653f));
  p = fma(p, fraction, broadcast(1.0f));
  return mul(p, power_of_two(rounded));
}

#endif

// Relative error below 3e-7, odd, NaN for NaN. Small arguments by Cephes' polynomial, others by e^(-2|x|).
inline Vec tanh(Vec x) {
  const Vec zero = broadcast(0.0f);
  const Vec magnitude = blend_less(x, zero, sub(zero, x), x);
  const Vec square = mul(x, x);
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, square, broadcast(2.06390887954e-2f));
  p = fma(p, square, broadcast(-5.37397155531e-2f));
  p = fma(p, square, broadcast(1.33314422036e-1f));
  p = fma(p, square, broadcast(-3.33332819422e-1f));
  const Vec small = fma(mul(p, square), x, x);
  const Vec power = exp2_nonpositive(max(broadcast(kExp2Floor), mul(magnitude, broadcast(-2.8853900817779268f))));
  const Vec large = div(sub(broadcast(1.0f), power), add(broadcast(1.0f), power));
  return blend_less(magnitude, broadcast(0.625f), small, blend_less(x, zero, sub(zero, large), large));
}

// The largest lane; NaN may be lost.
#if defined(__AVX512F__)
inline float horizontal_max(Vec x) { return _mm512_reduce_max_ps(x); }
#else
inline float horizontal_max(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
}
#endif

inline float horizontal_sum(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

}  // namespace
}  // namespace ggro::cpu
