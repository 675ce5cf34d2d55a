#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ggro/candidate_scores.h"
#include "ggro/entropy_topk.h"
#include "ggro/isa.h"

namespace py = pybind11;

namespace {

// Addresses, sizes and strides (in elements) only: tensors, their checks and their allocation belong to Python.
void entropy_topk(uintptr_t logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride, int64_t k,
                  float temperature, uintptr_t entropy, uintptr_t logsumexp, uintptr_t values, uintptr_t indices,
                  int num_threads) {
  ggro::entropy_topk({reinterpret_cast<const void*>(logits), static_cast<ggro::DType>(dtype), rows, vocab, row_stride,
                      k, temperature, reinterpret_cast<float*>(entropy), reinterpret_cast<float*>(logsumexp),
                      reinterpret_cast<void*>(values), reinterpret_cast<int64_t*>(indices), num_threads});
}

int64_t candidate_scores(uintptr_t gradient, int gradient_dtype, int64_t gradient_stride, uintptr_t table,
                         int table_dtype, int64_t table_stride, uintptr_t ids, int64_t positions, int64_t candidates,
                         int64_t vocab, int64_t width, uintptr_t scores, int num_threads) {
  return ggro::candidate_scores({reinterpret_cast<const void*>(gradient), static_cast<ggro::DType>(gradient_dtype),
                                 gradient_stride, reinterpret_cast<const void*>(table),
                                 static_cast<ggro::DType>(table_dtype), table_stride,
                                 reinterpret_cast<const int64_t*>(ids), positions, candidates, vocab, width,
                                 reinterpret_cast<float*>(scores), num_threads});
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of ggro_kernels; called through ggro_kernels only.";
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("available_isas", &ggro::available_isas);
  m.def("selected_isa", &ggro::selected_isa);
  m.def("entropy_topk", &entropy_topk, py::call_guard<py::gil_scoped_release>());
  m.def("candidate_scores", &candidate_scores, py::call_guard<py::gil_scoped_release>());
}
