#pragma once

#include <cstdint>

#include "simd.h"

// Dot products of fp32 vectors with vectors of any element type, accumulated in fp32 in an order that depends on the
// width only. In an unnamed namespace for the reason given in simd.h.
namespace ggro::cpu {
namespace {

constexpr int kDotUnroll = 4;
constexpr int64_t kDotStep = kDotUnroll * kLanes;

// step(i): called at every kDotStep columns, to interleave other work with the arithmetic.
template <typename T, typename Step>
float dot(const float* a, const T* b, int64_t width, Step step) {
  Vec sums[kDotUnroll];
  for (int u = 0; u < kDotUnroll; ++u) sums[u] = broadcast(0.0f);
  int64_t i = 0;
  for (; i + kDotStep <= width; i += kDotStep) {
    step(i);
#pragma GCC unroll 4
    for (int u = 0; u < kDotUnroll; ++u) {
      sums[u] = fma(load(a + i + u * kLanes), load(b + i + u * kLanes), sums[u]);
    }
  }
  for (; i + kLanes <= width; i += kLanes) sums[0] = fma(load(a + i), load(b + i), sums[0]);
  float sum = horizontal_sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; i < width; ++i) sum += a[i] * to_float(b[i]);
  return sum;
}

template <typename T>
float dot(const float* a, const T* b, int64_t width) {
  return dot(a, b, width, [](int64_t) {});
}

}  // namespace
}  // namespace ggro::cpu
