#pragma once

#include <cstdint>

#include "ggro/types.h"

namespace ggro {

// The k best of scores[p, v] = <gradient[p], table[v]> + bias[v] for every position, without holding all of them.
//
// The score of a forbidden id is -inf, whatever its row and its bias hold. The k scores are ordered by score
// descending, then index ascending; -0.0 equals +0.0 and NaN is the largest score. Scores are accumulated in fp32, in
// an order that depends on `width` only: a position's result does not depend on `positions`, `num_threads` or where it
// lies. Where there are instructions for pairs of bf16, they take denormals of two bf16 inputs for zeros.
struct ProjectTopKArgs {
  const void* gradient;  // [positions, width], unit column stride
  DType gradient_dtype;
  int64_t gradient_stride;  // in elements
  const void* table;        // [vocab, width], unit column stride
  DType table_dtype;
  int64_t table_stride;   // in elements
  const float* bias;      // [vocab], or null for zeros
  const bool* forbidden;  // [vocab], or null for none
  int64_t positions;
  int64_t vocab;  // 1 .. 2^31 - 1
  int64_t width;
  int64_t k;         // 1 .. vocab
  float* scores;     // [positions, k], contiguous
  int64_t* indices;  // [positions, k], contiguous
  int num_threads;
};

}  // namespace ggro
