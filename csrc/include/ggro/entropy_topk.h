#pragma once

#include <cstdint>

#include "ggro/types.h"

namespace ggro {

// Entropy (nats), logsumexp and the k largest logits of every row, in one read of the logits.
//
// The k values are ordered by value descending, then index ascending; -0.0 equals +0.0 and NaN is the largest value.
// Entropy and logsumexp are those of logits / temperature; values are copied from the logits bit by bit.
// A row's result depends on that row and on `vocab` only: not on `rows`, `num_threads` or where the row lies.
struct EntropyTopKArgs {
  const void* logits;  // [rows, vocab], unit column stride
  DType dtype;
  int64_t rows;
  int64_t vocab;       // 1 .. 2^31 - 1
  int64_t row_stride;  // in elements
  int64_t k;           // 1 .. vocab
  float temperature;
  float* entropy;    // [rows]
  float* logsumexp;  // [rows]
  void* values;      // [rows, k], contiguous, dtype of the logits
  int64_t* indices;  // [rows, k], contiguous
  int num_threads;
};

}  // namespace ggro
