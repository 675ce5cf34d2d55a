#pragma once

#include <cstdint>

#include "ggro/errors.h"
#include "ggro/prefix_attention.h"

// What attention and its gradient know of a prefix and its branches. In an unnamed namespace for the reason given in
// simd.h.
namespace ggro::cpu {
namespace {

// The keys of a segment that a token sees.
struct Range {
  int64_t first;
  int64_t end;
};

// Keys and values of consecutive tokens of one key head: a prefix or a branch.
template <typename T>
struct Segment {
  const T* keys;
  int64_t key_stride;
  const T* values;
  int64_t value_stride;

  Segment from(int64_t token) const {
    return {keys + token * key_stride, key_stride, values + token * value_stride, value_stride};
  }
};

template <typename T>
const T* head_of(const HeadsView& view, int64_t batch, int64_t head) {
  return static_cast<const T*>(view.data) + batch * view.batch_stride + head * view.head_stride;
}

template <typename T>
Segment<T> segment(const HeadsView& keys, const HeadsView& values, int64_t batch, int64_t head) {
  return {head_of<T>(keys, batch, head), keys.token_stride, head_of<T>(values, batch, head), values.token_stride};
}

// Where the key and value of a token lie among those of the branches.
template <typename Args>
int64_t end_of(const Args& args, int64_t batch, int64_t token) {
  return args.branch_ends == nullptr ? token : args.branch_ends[batch * args.tokens + token];
}

template <typename Args>
int64_t prefix_length(const Args& args, int64_t batch) {
  return args.prefix_lengths == nullptr ? args.prefix_tokens : args.prefix_lengths[batch];
}

template <typename Args>
void check_branches(const Args& args) {
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t length = prefix_length(args, b);
    if (length < 0 || length > args.prefix_tokens) {
      throw_out_of_range("prefix_lengths", b, length, args.prefix_tokens, "the prefix tokens there are");
    }
    for (int64_t i = 0; i < args.tokens; ++i) {
      const int64_t start = args.branch_starts[b * args.tokens + i], end = end_of(args, b, i);
      if (end < 0 || end >= args.branch_tokens) {
        throw_out_of_range("branch_ends", b, i, end, args.branch_tokens - 1, "the branch tokens there are");
      }
      if (start < 0 || start > end) throw_out_of_range("branch_starts", b, i, start, end, "the tokens up to this one");
    }
  }
}

}  // namespace
}  // namespace ggro::cpu
