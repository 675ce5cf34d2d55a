#pragma once

#include <cstdint>

#include "ggro/types.h"

namespace ggro {

// scores[p, j] = <gradient[p], table[ids[p, j]]>, accumulated in fp32 in an order that depends on `width` only.
// Throws std::out_of_range for an id outside 0 .. vocab - 1.
struct CandidateScoresArgs {
  const void* gradient;  // [positions, width], unit column stride
  DType gradient_dtype;
  int64_t gradient_stride;  // in elements
  const void* table;        // [vocab, width], unit column stride
  DType table_dtype;
  int64_t table_stride;  // in elements
  const int64_t* ids;    // [positions, candidates], contiguous
  int64_t positions;
  int64_t candidates;
  int64_t vocab;
  int64_t width;
  float* scores;  // [positions, candidates], contiguous
  int num_threads;
};

}  // namespace ggro
