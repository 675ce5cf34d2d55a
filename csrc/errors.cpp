#include "ggro/errors.h"

#include <sstream>
#include <stdexcept>
#include <string>

namespace ggro {

void throw_out_of_range(const char* argument, int64_t row, int64_t column, int64_t value, int64_t last,
                        const char* meaning) {
  throw std::out_of_range(std::string(argument) + "[" + std::to_string(row) + ", " + std::to_string(column) +
                          "] must be in 0 .. " + std::to_string(last) + ", " + meaning + ", got " +
                          std::to_string(value));
}

void throw_out_of_range(const char* argument, int64_t index, int64_t value, int64_t last, const char* meaning) {
  throw std::out_of_range(std::string(argument) + "[" + std::to_string(index) + "] must be in 0 .. " +
                          std::to_string(last) + ", " + meaning + ", got " + std::to_string(value));
}

void throw_not_in_unit_interval(const char* argument, int64_t index, float value) {
  std::ostringstream message;
  message << argument << '[' << index << "] must be in [0, 1), got " << value;
  throw std::invalid_argument(message.str());
}

}  // namespace ggro
