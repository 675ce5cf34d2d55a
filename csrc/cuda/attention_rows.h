#pragma once

#include "ggro/prefix_attention.h"
#include "logits.h"
#include "portable.h"

// What rows, splits and partial results are, for both kernels of prefix_attention.
//
// A row is one token of one query head. The rows of a key head lie token by token, so that neighbours read the same
// keys. A slot is the part of the keys that one block takes a tile of rows through: slot 0 the long branches, slot
// 1 + i split i of the prefix.

namespace ggro::cuda {

// A token whose branch has at most this many tokens so far attends to them while its slots are merged.
constexpr int kShortBranch = 16;

// Keys that go through the softmax together, counted from the first token of the prefix and of a branch.
constexpr int kTileKeys = 64;

// Borders of splits depend on nothing but the place in the prefix. Splits of 128 tokens up to token 1024 let the short
// prefix of one decoded token fill a GPU, of 256 up to 16384, then of 1024 keep partial results few.
constexpr int64_t split_start(int64_t split) {
  const int64_t by_256 = split * 256 - 1024, by_1024 = split * 1024 - 53248;
  const int64_t longer = by_256 > by_1024 ? by_256 : by_1024;
  return split * 128 > longer ? split * 128 : longer;
}
constexpr int64_t split_of(int64_t token) {
  const int64_t by_256 = token / 256 + 4, by_1024 = token / 1024 + 52;
  const int64_t longer = by_256 < by_1024 ? by_256 : by_1024;
  return token / 128 < longer ? token / 128 : longer;
}
constexpr int64_t count_splits(int64_t prefix_tokens) {
  return prefix_tokens == 0 ? 0 : split_of(prefix_tokens - 1) + 1;
}

struct AttentionArgs {
  PrefixAttentionArgs op;
  HeadsView views[2][2];  // of branches and of the prefix: keys and values
  int group;              // query heads of a key head
  int rows;               // of a key head
  int slots;              // 1 + splits
  int first_slot;         // 1 where no branch can be long
  int row_tiles;
  int value_tiles;
  int partial_width;  // columns of a partial result: those of the values, rounded up
  float factor;       // of a product of query and key, where exponents are those of 2
  float cap;          // softcap * log2 e, or 0; the factor is then without it
  float* maxima;      // [batch, key_heads, slots, rows]
  float* sums;        // the same, of weights relative to the maxima
  float* partials;    // [batch, key_heads, slots, rows, partial_width], weighted values
};

// The smaller, which an int can hold.
constexpr int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// Columns of tiles in shared memory and of partial results come in sixteens.
constexpr int round_up(int columns) { return (columns + 15) / 16 * 16; }

// 0 .. last, whatever was given: indices on a GPU are not checked.
GGRO_DEVICE int clamped(int64_t given, int64_t last) { return given < 0 ? 0 : least(given, last); }

// Where the key and value of a token lie among those of the branches.
GGRO_DEVICE int branch_end(const PrefixAttentionArgs& op, int64_t batch, int token) {
  return op.branch_ends == nullptr ? token : clamped(op.branch_ends[batch * op.tokens + token], op.branch_tokens - 1);
}

GGRO_DEVICE int branch_start(const PrefixAttentionArgs& op, int64_t batch, int token, int end) {
  return clamped(op.branch_starts[batch * op.tokens + token], end);
}

// How many tokens of its branch come before a token.
GGRO_DEVICE int place_in_branch(const PrefixAttentionArgs& op, int64_t batch, int token) {
  const int end = branch_end(op, batch, token);
  return end - branch_start(op, batch, token, end);
}

GGRO_DEVICE int prefix_length(const PrefixAttentionArgs& op, int64_t batch) {
  return op.prefix_lengths == nullptr ? static_cast<int>(op.prefix_tokens)
                                      : clamped(op.prefix_lengths[batch], op.prefix_tokens);
}

// How many keys at the beginning of `before` and its branch lie outside the window of token `own` of the branch.
GGRO_DEVICE int outside_window(const PrefixAttentionArgs& op, int before, int own) {
  const int64_t outside = static_cast<int64_t>(before) + own + 1 - op.window;
  return outside > 0 ? static_cast<int>(outside) : 0;
}

GGRO_DEVICE float capped(float dot, float factor, float cap) { return product(tanhf(product(dot, factor)), cap); }

// What is subtracted from scores: scores that are all -inf have no finite difference from their maximum.
GGRO_DEVICE float shift_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

template <typename T>
GGRO_DEVICE const T* tokens_of(const HeadsView& view, int64_t batch, int64_t head) {
  return static_cast<const T*>(view.data) + batch * view.batch_stride + head * view.head_stride;
}

}  // namespace ggro::cuda
