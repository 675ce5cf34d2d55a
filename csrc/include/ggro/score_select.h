#pragma once

#include <cstdint>

#include "ggro/types.h"

namespace ggro {

// reward = <hidden, head>, accumulated in fp32 in an order that depends on `width` only; score = logit + weight *
// reward, -inf where the logit is; and of every row the candidate to take.
//
// Without uniforms that is the first of the largest score; -0.0 equals +0.0 and NaN is the largest. With them it is the
// smallest j whose cumulative sum of e^(score / temperature), in index order and fp64, exceeds uniform * total; where
// the largest score is not finite, the choice without uniforms.
// Throws std::invalid_argument for a uniform outside [0, 1).
struct ScoreSelectArgs {
  const void* hidden;  // [rows, candidates, width], unit column stride
  DType hidden_dtype;
  int64_t hidden_row_stride;        // in elements
  int64_t hidden_candidate_stride;  // in elements
  const void* head;                 // [width], contiguous
  DType head_dtype;
  const void* logits;  // [rows, candidates], contiguous
  DType logits_dtype;
  const float* uniforms;  // [rows] or null
  int64_t rows;
  int64_t candidates;  // 1 or more
  int64_t width;
  float weight;
  double temperature;
  int64_t* index;  // [rows]
  float* reward;   // [rows, candidates], contiguous
  float* score;    // [rows, candidates], contiguous
  int num_threads;
};

}  // namespace ggro
