#pragma once

#include <cstdint>

#include "ggro/types.h"

namespace ggro {

// Gradient of entropy_topk's entropy, logsumexp and values with respect to the logits, in one read and one write:
//   p / temperature * (g_l - g_h (log p + entropy)), p = e^(logits / temperature - logsumexp),
// with g_h and g_l those of entropy and logsumexp, plus the value's gradient where a logit was selected. 0 where p is;
// a row whose g_h and g_l are 0 gets those of the values only, so that an entropy of NaN that was masked out does no
// harm. Each logit's gradient depends on its own row only.
struct EntropyTopKBackwardArgs {
  const float* entropy_gradient;    // [rows]
  const float* logsumexp_gradient;  // [rows]
  const void* values_gradient;      // [rows, k], contiguous
  const void* logits;               // [rows, vocab], unit column stride
  DType dtype;                      // of logits, values_gradient and gradient
  int64_t rows;
  int64_t vocab;
  int64_t row_stride;  // in elements
  int64_t k;
  const float* entropy;    // [rows]
  const float* logsumexp;  // [rows]
  const int64_t* indices;  // [rows, k], contiguous
  float temperature;
  void* gradient;  // [rows, vocab], contiguous
  int num_threads;
};

}  // namespace ggro
