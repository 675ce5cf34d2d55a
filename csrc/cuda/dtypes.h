#pragma once

#include "ggro/types.h"

namespace ggro::cuda {

// Calls body with a value of the element type.
template <typename Body>
void with_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float());
    case DType::kBFloat16:
      return body(BFloat16());
    case DType::kFloat16:
      return body(Float16());
  }
}

}  // namespace ggro::cuda
