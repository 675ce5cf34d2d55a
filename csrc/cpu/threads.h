#pragma once

#include <algorithm>
#include <cstdint>

// In an unnamed namespace for the reason given in simd.h.
namespace ggro::cpu {
namespace {

// How many of num_threads to use, at least one: no more than there are parts, and none for less work than
// `work_per_thread`, which would cost less than waking the thread.
inline int thread_count(int num_threads, int64_t parts, int64_t work, int64_t work_per_thread) {
  const int64_t useful = std::min(parts, work / work_per_thread);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, useful)));
}

}  // namespace
}  // namespace ggro::cpu
