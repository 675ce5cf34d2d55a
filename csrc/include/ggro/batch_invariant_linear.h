#pragma once

#include <cstdint>

#include "ggro/types.h"

namespace ggro {

// output[r, n] = <x[r], weight[n]> + bias[n], accumulated in fp32 in an order that depends on `width` only.
//
// A row's result depends, bit by bit, on that row, `weight` and `bias` only: not on `rows`, `num_threads` or where the
// row lies. The bias is added to the finished sum, which is then rounded to the dtype.
struct BatchInvariantLinearArgs {
  const void* x;          // [rows, width], contiguous
  const void* weight;     // [outputs, width], unit column stride
  int64_t weight_stride;  // in elements
  const void* bias;       // [outputs], contiguous, or null for zeros
  DType dtype;            // of all tensors
  int64_t rows;
  int64_t outputs;
  int64_t width;
  void* output;  // [rows, outputs], contiguous
  int num_threads;
};

// x_gradient[r, k] = sum over n of gradient[r, n] weight[n, k], accumulated in fp32 in an order that depends on
// `outputs` only, with the promises of BatchInvariantLinearArgs.
struct BatchInvariantLinearBackwardArgs {
  const void* gradient;   // [rows, outputs], contiguous
  const void* weight;     // [outputs, width], unit column stride
  int64_t weight_stride;  // in elements
  DType dtype;            // of all tensors
  int64_t rows;
  int64_t outputs;
  int64_t width;
  void* x_gradient;  // [rows, width], contiguous
  int num_threads;
};

}  // namespace ggro
