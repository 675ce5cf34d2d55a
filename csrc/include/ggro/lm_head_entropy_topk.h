#pragma once

#include <cstdint>

#include "ggro/types.h"

namespace ggro {

// entropy_topk of logits[r, v] = <hidden[r], weight[v]> + bias[v], capped as softcap * tanh(logit / softcap), without
// holding all of them.
//
// Logits are accumulated in fp32, in an order that depends on `width` only, and never rounded to the dtype of `hidden`.
// Where there are instructions for pairs of bf16, they take denormals of two bf16 inputs for zeros.
// Entropy (nats) and logsumexp are those of logits / temperature; values are the logits, ordered by value descending,
// then index ascending; -0.0 equals +0.0 and NaN is the largest value.
// A row's result depends on that row and on `vocab` only: not on `rows`, `num_threads` or where the row lies.
struct LmHeadEntropyTopKArgs {
  const void* hidden;  // [rows, width], unit column stride
  DType hidden_dtype;
  int64_t hidden_stride;  // in elements
  const void* weight;     // [vocab, width], unit column stride
  DType weight_dtype;
  int64_t weight_stride;  // in elements
  const float* bias;      // [vocab], or null for zeros
  float softcap;          // 0: none
  float temperature;
  int64_t rows;
  int64_t vocab;  // 1 .. 2^31 - 1
  int64_t width;
  int64_t k;         // 1 .. vocab
  float* entropy;    // [rows]
  float* logsumexp;  // [rows]
  float* values;     // [rows, k], contiguous
  int64_t* indices;  // [rows, k], contiguous
  int num_threads;
};

}  // namespace ggro
