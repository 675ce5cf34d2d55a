#include <pybind11/pybind11.h>

#include "bindings_cuda.h"
#include "misuse.h"

PYBIND11_MODULE(_emulated, m) {
  ggro::binding::define_cuda(m);
  m.def("misuse", &ggro::cuda::emulation::misuse);
}
