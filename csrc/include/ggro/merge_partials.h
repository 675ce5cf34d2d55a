#pragma once

#include <cstdint>

#include "ggro/types.h"

namespace ggro {

// The entropy_topk of whole rows from those of `shards` slices of their columns, slice i beginning at offsets[i].
//
// logsumexp = log sum e^(l_i), entropy = sum p_i (h_i + logsumexp - l_i) with p_i = e^(l_i - logsumexp), in fp64 and in
// the order of the offsets: the order in which the shards are given does not matter. A shard with l_i = -inf adds
// nothing. The k values are ordered by value descending, then index ascending, as in entropy_topk.
struct MergePartialsArgs {
  const float* entropy;    // [shards, rows], contiguous
  const float* logsumexp;  // [shards, rows], contiguous
  const void* values;      // [shards, rows, k], contiguous
  DType dtype;
  const int64_t* indices;  // [shards, rows, k], contiguous, within the shard
  const int64_t* offsets;  // [shards]
  int64_t shards;          // 1 or more
  int64_t rows;
  int64_t k;
  float* merged_entropy;    // [rows]
  float* merged_logsumexp;  // [rows]
  void* merged_values;      // [rows, k], contiguous, dtype of the values
  int64_t* merged_indices;  // [rows, k], contiguous, offsets added
  int num_threads;
};

}  // namespace ggro
