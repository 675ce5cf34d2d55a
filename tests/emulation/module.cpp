#include "bindings_cuda.h"

PYBIND11_MODULE(_emulated, m) { ggro::binding::define_cuda(m); }
