#pragma once

#include "ggro/ops.h"

// The same kernel sources are compiled once per instruction set, each time into its own namespace.
namespace ggro::cpu {

#define GGRO_DECLARE(op, Args) void op(const Args& args);
namespace baseline {
GGRO_OPS(GGRO_DECLARE)
}
namespace avx2 {
GGRO_OPS(GGRO_DECLARE)
}
namespace avx512 {
GGRO_OPS(GGRO_DECLARE)
}
namespace avx512bf16 {
GGRO_OPS(GGRO_DECLARE)
}
#undef GGRO_DECLARE

}  // namespace ggro::cpu
