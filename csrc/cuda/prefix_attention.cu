#include "attend.h"
#include "attention_rows.h"
#include "dot.h"
#include "dtypes.h"
#include "ggro/cuda.h"
#include "warp.h"

// Floor: the keys and values of prefix and branches read once, 2 (N + T) Hkv D elements. A first launch takes all rows
// of a key head, 64 at a time, through every split of the prefix; the second merges the splits of each row, with what
// the row sees of a short branch.

namespace ggro::cuda {
namespace {

// A warp has 32 columns of one row, in the order of the output. kEnds: there are branch_ends.
template <typename T, bool kEnds>
struct MergeKernel {
  using Args = AttentionArgs;
  static constexpr int kThreads = 128;
  static constexpr int kBlocksAtOnce = 6;
  static constexpr int kColumns = 32;
  static constexpr int kSlotsAtOnce = 16;

  static int64_t items(const Args& args) {
    const PrefixAttentionArgs& op = args.op;
    return op.batch * op.tokens * op.query_heads * divide_up(op.value_width, kColumns);
  }

  static GGRO_DEVICE void run(Thread& thread, const Args& args) {
    const PrefixAttentionArgs& op = args.op;
    const int64_t tiles = divide_up(op.value_width, kColumns);
    const int64_t item = thread.block() * (kThreads / 32) + thread.warp();
    const int64_t row = item / tiles;
    if (row >= op.batch * op.tokens * op.query_heads) return thread.wait_for_previous_kernel();
    const int64_t column = item % tiles * kColumns + thread.lane();
    const bool exists = column < op.value_width;
    const int64_t query_head = row % op.query_heads, head = query_head / args.group;
    const int64_t batch = row / op.query_heads / op.tokens;
    const int token = static_cast<int>(row / op.query_heads % op.tokens);
    const int last = kEnds ? branch_end(op, batch, token) : token;
    const int start = branch_start(op, batch, token, last), own = last - start, length = prefix_length(op, batch);

    float maximum = -INFINITY, sum = 0.0f, out = 0.0f;
    if (own < kShortBranch) {
      const T* query = tokens_of<T>(op.query, batch, query_head) + token * op.query.token_stride;
      const T* keys = tokens_of<T>(op.branch_key, batch, head) + start * op.branch_key.token_stride;
      const T* values = tokens_of<T>(op.branch_value, batch, head) + start * op.branch_value.token_stride + column;
      const int first = outside_window(op, 0, own);
      float of_lane = 0.0f;
      for (int key = first; key <= own; ++key) {
        const float dot = warp_dot(thread, query, keys + key * op.branch_key.token_stride, op.key_width);
        if (thread.lane() == key) of_lane = dot;
      }
      const float scaled = args.cap == 0.0f ? product(of_lane, args.factor) : capped(of_lane, args.factor, args.cap);
      const float score = thread.lane() >= first && thread.lane() <= own ? scaled : -INFINITY;
      maximum = warp_max(thread, score);
      const float weight = power_of_two(score - shift_of(maximum));
      sum = sum_of_lanes(thread, weight);
      float value[kShortBranch];
#pragma unroll
      for (int key = 0; key < kShortBranch; ++key) {
        const bool reads = exists && key >= first && key <= own;
        value[key] = reads ? to_float(values[key * op.branch_value.token_stride]) : 0.0f;
      }
#pragma unroll
      for (int key = 0; key < kShortBranch; ++key) out = fmaf(thread.shuffle(weight, key), value[key], out);
    }

    // Thirty-two slots at a time, from slot 0 on, whichever of them the row has.
    thread.wait_for_previous_kernel();
    const int unseen = outside_window(op, length, own);
    const int first = unseen < length ? 1 + static_cast<int>(split_of(unseen)) : 1;
    const int end = unseen < length ? 2 + static_cast<int>(split_of(length - 1)) : 1;
    const int64_t place =
        (batch * op.key_heads + head) * args.slots * args.rows + token * args.group + query_head % args.group;
    const float* partial = args.partials + place * args.partial_width + column;
    const int64_t slot_stride = static_cast<int64_t>(args.rows) * args.partial_width;
    for (int base = 0; base < end; base += 32) {
      const int mine = base + thread.lane();
      const bool has = mine == 0 ? own >= kShortBranch : mine >= first && mine < end;
      const int64_t place_of_mine = place + static_cast<int64_t>(mine) * args.rows;
      const float slot_maximum = has ? args.maxima[place_of_mine] : -INFINITY;
      const float slot_sum = has ? args.sums[place_of_mine] : 0.0f;
      const float new_maximum = fmaxf(maximum, warp_max(thread, slot_maximum));
      const float shift = shift_of(new_maximum);
      const float rescale = power_of_two(maximum - shift), factor = power_of_two(slot_maximum - shift);
      maximum = new_maximum;
      sum = fmaf(sum, rescale, sum_of_lanes(thread, product(factor, slot_sum)));
      out *= rescale;
      const unsigned with = thread.ballot(has);
      for (int group = 0; group < 32; group += kSlotsAtOnce) {
        // All loads begin before the first is waited for.
        float value[kSlotsAtOnce];
#pragma unroll
        for (int i = 0; i < kSlotsAtOnce; ++i) {
          const bool reads = exists && (with >> (group + i) & 1) != 0;
          value[i] = reads ? *partial : 0.0f;
          partial += slot_stride;
        }
#pragma unroll
        for (int i = 0; i < kSlotsAtOnce; ++i) out = fmaf(thread.shuffle(factor, group + i), value[i], out);
      }
    }

    const bool legal = op.branch_starts[batch * op.tokens + token] == start &&
                       (!kEnds || op.branch_ends[batch * op.tokens + token] == start + own) &&
                       (op.prefix_lengths == nullptr || op.prefix_lengths[batch] == length);
    if (exists) static_cast<T*>(op.output)[row * op.value_width + column] = from_float<T>(legal ? out / sum : NAN);
  }

 private:
  static GGRO_DEVICE float warp_max(const Thread& thread, float x) {
    for (int mask = 1; mask < 32; mask *= 2) x = fmaxf(x, thread.shuffle_xor(x, mask));
    return x;
  }
};

AttentionArgs arguments(const PrefixAttentionArgs& op, void* workspace) {
  constexpr double kLog2E = 1.4426950408889634;
  AttentionArgs args = {};
  args.op = op;
  args.views[0][0] = op.branch_key;
  args.views[0][1] = op.branch_value;
  args.views[1][0] = op.prefix_key;
  args.views[1][1] = op.prefix_value;
  args.group = static_cast<int>(op.query_heads / op.key_heads);
  args.rows = static_cast<int>(op.tokens) * args.group;
  args.slots = static_cast<int>(1 + count_splits(op.prefix_tokens));
  args.first_slot = op.branch_tokens > kShortBranch ? 0 : 1;
  args.partial_width = round_up(static_cast<int>(op.value_width));
  args.factor = op.softcap == 0.0f ? static_cast<float>(op.scale * kLog2E) : op.scale / op.softcap;
  args.cap = static_cast<float>(op.softcap * kLog2E);
  const int64_t results = op.batch * op.key_heads * args.slots * args.rows;
  args.partials = static_cast<float*>(workspace);
  args.maxima = args.partials + results * args.partial_width;
  args.sums = args.maxima + results;
  return args;
}

template <typename T, int P, bool kWide = false>
void attend_in_columns(AttentionArgs& args, const Stream& stream) {
  using Kernel = AttendKernel<T, P, kWide>;
  args.row_tiles = static_cast<int>(divide_up(args.rows, Kernel::kRows));
  args.value_tiles = static_cast<int>(divide_up(args.op.value_width, P));
  const int64_t heads = args.op.batch * args.op.key_heads;
  launch<Kernel>("prefix_attention: attend", heads * (args.slots - args.first_slot) * args.value_tiles * args.row_tiles,
                 Kernel::shared_bytes(args.rows), args, stream);
}

template <typename T>
void attend(AttentionArgs& args, const Stream& stream) {
  const int64_t widest = args.op.key_width > args.op.value_width ? args.op.key_width : args.op.value_width;
  if (widest <= 64) return attend_in_columns<T, 64>(args, stream);
  if (widest <= 128) return attend_in_columns<T, 128>(args, stream);
  if constexpr (sizeof(T) == 2) {
    if (widest <= 256) return attend_in_columns<T, 256>(args, stream);
  }
  attend_in_columns<T, 128, true>(args, stream);
}

template <typename Merge>
void merge(const AttentionArgs& args, bool attends, const Stream& stream) {
  launch<Merge>("prefix_attention: merge", divide_up(Merge::items(args), Merge::kThreads / 32), 0, args, stream,
                attends);
}

}  // namespace

int64_t prefix_attention_workspace(const PrefixAttentionArgs& op) {
  const AttentionArgs args = arguments(op, nullptr);
  return 4 * op.batch * op.key_heads * args.slots * args.rows * (args.partial_width + 2);
}

void prefix_attention(const PrefixAttentionArgs& op, void* workspace, const Stream& stream) {
  if (op.batch * op.query_heads * op.tokens * op.value_width == 0) return;
  AttentionArgs args = arguments(op, workspace);
  const bool attends = args.slots > args.first_slot;
  with_dtype(op.dtype, [&](auto element) {
    using T = decltype(element);
    if (attends) attend<T>(args, stream);
    if (op.branch_ends == nullptr) {
      merge<MergeKernel<T, false>>(args, attends, stream);
    } else {
      merge<MergeKernel<T, true>>(args, attends, stream);
    }
  });
}

}  // namespace ggro::cuda
