#pragma once

#include "ggro/types.h"

// In an unnamed namespace for the reason given in simd.h.
namespace ggro::cpu {
namespace {

// Calls function(value of the element type) for the type that `dtype` names; decltype of the argument is that type.
template <typename Function>
void with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float());
    case DType::kBFloat16:
      return function(BFloat16());
    case DType::kFloat16:
      return function(Float16());
  }
}

template <typename Function>
void with_dtypes(DType first, DType second, const Function& function) {
  with_dtype(first, [&](auto a) { with_dtype(second, [&](auto b) { function(a, b); }); });
}

}  // namespace
}  // namespace ggro::cpu
