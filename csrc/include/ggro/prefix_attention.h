#pragma once

#include <cstdint>

#include "ggro/types.h"

namespace ggro {

// [batch, heads, tokens, width] with unit stride along the width; strides in elements.
struct HeadsView {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t token_stride;
};

// Attention of ragged branches that share a prefix. Token i of a row sees the prefix and the branch tokens
// branch_starts[i] .. branch_ends[i], the last of which is itself; its position is
// prefix_length + branch_ends[i] - branch_starts[i], and with a window it sees the keys at positions > position -
// window only.
//
// Scores, softmax and sums are fp32. A token's result is, bit by bit, a function of its query, of the keys and values
// it sees and of their places in prefix and branch: not of other tokens, of the batch or of the threads, nor of what it
// does not see, be it NaN. Memory beside the output does not grow with tokens or keys. Throws std::out_of_range unless
// 0 <= prefix_lengths[b] <= prefix_tokens and 0 <= branch_starts[b, i] <= branch_ends[b, i] < branch_tokens.
struct PrefixAttentionArgs {
  DType dtype;                    // of all tensors, the output included
  HeadsView query;                // [batch, query_heads, tokens, key_width]
  HeadsView prefix_key;           // [batch, key_heads, prefix_tokens, key_width]
  HeadsView prefix_value;         // [batch, key_heads, prefix_tokens, value_width]
  HeadsView branch_key;           // [batch, key_heads, branch_tokens, key_width]
  HeadsView branch_value;         // [batch, key_heads, branch_tokens, value_width]
  const int64_t* branch_starts;   // [batch, tokens], contiguous
  const int64_t* branch_ends;     // the same, or null: token i ends at i, and branch_tokens = tokens
  const int64_t* prefix_lengths;  // [batch], or null: prefix_tokens
  int64_t batch;
  int64_t query_heads;  // a multiple of key_heads; head h reads key head h / (query_heads / key_heads)
  int64_t key_heads;
  int64_t tokens;
  int64_t prefix_tokens;
  int64_t branch_tokens;
  int64_t key_width;
  int64_t value_width;
  float scale;
  float softcap;   // scores become softcap * tanh(scores / softcap); 0: they stay
  int64_t window;  // at least 1; no window: 2^62
  void* output;    // [batch, tokens, query_heads, value_width], contiguous
  int num_threads;
};

// What reaches the queries and the keys and values of the branches from a gradient of the output; the prefix is a
// constant. Fields as above.
//
// Sums are fp32, rounded to the dtype once. Tokens that begin at different branch_starts have no influence on each
// other's gradients, be it NaN, and what no token sees is not read into any. Memory beside the outputs is a head's
// branches in fp32 for each thread, and scores of a few rows. A key head is one thread's work.
struct PrefixAttentionBackwardArgs {
  DType dtype;
  HeadsView gradient;  // [batch, query_heads, tokens, value_width]
  HeadsView query;
  HeadsView prefix_key;
  HeadsView prefix_value;
  HeadsView branch_key;
  HeadsView branch_value;
  const int64_t* branch_starts;
  const int64_t* branch_ends;
  const int64_t* prefix_lengths;
  int64_t batch;
  int64_t query_heads;
  int64_t key_heads;
  int64_t tokens;
  int64_t prefix_tokens;
  int64_t branch_tokens;
  int64_t key_width;
  int64_t value_width;
  float scale;
  float softcap;
  int64_t window;
  void* query_gradient;  // [batch, tokens, query_heads, key_width], contiguous
  void* key_gradient;    // [batch, branch_tokens, key_heads, key_width], contiguous
  void* value_gradient;  // [batch, branch_tokens, key_heads, value_width], contiguous
  int num_threads;
};

}  // namespace ggro
