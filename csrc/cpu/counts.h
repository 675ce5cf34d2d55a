#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

// In an unnamed namespace for the reason given in simd.h.
namespace ggro::cpu {
namespace {

// Inlined, so that the compiler makes one jump table of it and what `function` captures stays in registers.
template <typename Function, int... kIndices>
[[gnu::always_inline]] inline void with_count(int64_t n, const Function& function,
                                              std::integer_sequence<int, kIndices...>) {
  ((n == kIndices + 1 && (function(std::integral_constant<int, kIndices + 1>()), true)) || ...);
}

// Calls function(std::integral_constant<int, n>()) for n in 1..kMax: what it calls is compiled for every count.
template <int kMax, typename Function>
[[gnu::always_inline]] inline void with_count(int64_t n, const Function& function) {
  with_count(n, function, std::make_integer_sequence<int, kMax>());
}

}  // namespace
}  // namespace ggro::cpu
