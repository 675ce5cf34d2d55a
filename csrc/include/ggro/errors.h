#pragma once

#include <cstdint>

namespace ggro {

// Throws std::out_of_range (an IndexError in Python): "ids[1, 4] must be in 0 .. 49, the rows of the table, got 50".
// Out of line, so that no code for building messages is compiled per instruction set.
[[noreturn]] void throw_out_of_range(const char* argument, int64_t row, int64_t column, int64_t value, int64_t last,
                                     const char* meaning);

// The same for a vector: "prefix_lengths[1] must be in 0 .. 49, the tokens of the prefix, got 50".
[[noreturn]] void throw_out_of_range(const char* argument, int64_t index, int64_t value, int64_t last,
                                     const char* meaning);

// Throws std::invalid_argument (a ValueError in Python): "uniforms[3] must be in [0, 1), got 1.5".
[[noreturn]] void throw_not_in_unit_interval(const char* argument, int64_t index, float value);

}  // namespace ggro
