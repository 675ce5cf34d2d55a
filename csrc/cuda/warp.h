#pragma once

#include "portable.h"

namespace ggro::cuda {

// In a fixed order; the same in all lanes.
GGRO_DEVICE float sum_of_lanes(const Thread& thread, float x) {
  for (int mask = 1; mask < 32; mask *= 2) x += thread.shuffle_xor(x, mask);
  return x;
}

}  // namespace ggro::cuda
