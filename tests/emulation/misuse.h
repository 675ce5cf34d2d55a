#pragma once

#include <string>

namespace ggro::cuda::emulation {

// Runs the kernel of that name.
void misuse(const std::string& name);

}  // namespace ggro::cuda::emulation
