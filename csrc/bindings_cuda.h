#pragma once

#include <pybind11/pybind11.h>

namespace ggro::binding {

// Defines the functions of the kernels for NVIDIA GPUs in a module.
void define_cuda(pybind11::module_& m);

}  // namespace ggro::binding
