#pragma once

#include <string>
#include <vector>

namespace ggro {

// Instruction sets that the CPU kernels were compiled for and this processor can run, narrowest first.
std::vector<std::string> available_isas();

// The widest available one, or the one named by the environment variable GGRO_CPU_ISA.
// Throws std::invalid_argument when that names one that is unknown or cannot run here.
std::string selected_isa();

}  // namespace ggro
