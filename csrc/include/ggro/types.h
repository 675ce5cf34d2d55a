#pragma once

#include <cstdint>

namespace ggro {

// Element types of tensors that cross the binding; the numbers are part of the Python side's contract.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace ggro
