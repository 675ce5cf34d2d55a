#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

// From fp32 to narrower types, to nearest, ties to even. In an unnamed namespace for the reason given in simd.h.
namespace ggro::cpu {
namespace {

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  if (x != x) return {0x7fc0u};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {0x7e00u};
  constexpr uint32_t kTwoTo16 = 0x47800000u;
  constexpr uint32_t kSmallestNormal = 0x38800000u;
  if (bits >= kTwoTo16) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (bits < kSmallestNormal) {
    // The last bit of a number in [0.5, 1) is that of a half's denormals: adding 0.5 rounds.
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  constexpr uint32_t kBiasDifference = 112u << 23;
  return {static_cast<uint16_t>(sign | ((bits + 0xfffu + ((bits >> 13) & 1u) - kBiasDifference) >> 13))};
}

}  // namespace
}  // namespace ggro::cpu
