#pragma once

#include "logits.h"
#include "portable.h"
#include "selection.h"
#include "warp.h"

// Entropy, logsumexp and top k of rows as wide as a vocabulary, in two launches.
//
// Every warp of the first reads one chunk of a row, once: the sums of its softmax and the maxima of groups of columns.
// A block a row of the second merges the sums and selects: the k largest logits lie in the k groups whose maxima are
// the largest (of equal ones the first), so it reads those groups again and nothing else. Chunks do not depend on the
// number of rows, nor does any order of summation: a row's bits are the same in every batch.

namespace ggro::cuda {

// Columns that one warp reduces.
constexpr int kChunk = 1024;

// Columns that share a maximum: V / group maxima and k * group logits are left to be searched.
constexpr int group_of(int64_t k) { return k <= 64 ? 64 : 32; }

// Up to so many columns are searched as they are.
constexpr int64_t searched_whole(int64_t k) { return group_of(k) * k; }

// What a first read keeps of rows: floats, in the workspace of the caller.
struct Reduced {
  float* maxima;  // [rows, groups of whole chunks]; NaN where a group has one, -inf beyond the last column
  float* sums;    // [rows, 3, chunks]: m = max x, s = sum e^(x - m), t = sum (x - m) e^(x - m); or null
  int64_t chunks;

  static int64_t floats(int64_t rows, int64_t vocab, int64_t k, bool with_sums) {
    const int64_t chunks = divide_up(vocab, kChunk);
    return rows * chunks * (kChunk / group_of(k) + (with_sums ? 3 : 0));
  }
};

template <typename T>
struct ReduceArgs {
  const T* logits;
  int64_t row_stride;
  int64_t columns;
  int64_t rows;
  int64_t row_chunks;   // of these columns
  int64_t first_chunk;  // their place among all chunks of the sums
  float temperature;
  Reduced reduced;  // the maxima start with these columns
};

template <typename T, int Group, bool WithSums>
struct ReduceKernel {
  using Args = ReduceArgs<T>;
  static constexpr int kThreads = 128;
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kVectors = kChunk / 32 / kWidth;

  static GGRO_DEVICE void run(Thread& thread, const Args& args) {
    const int64_t index = thread.block() * (kThreads / 32) + thread.warp();
    const int64_t row = index / args.row_chunks, chunk = index % args.row_chunks;
    if (row >= args.rows) return;
    const T* logits = args.logits + row * args.row_stride;

    float x[kVectors][kWidth];
    const int64_t first = chunk * kChunk;
    load_logits(logits, args.columns, {first, first + kChunk, first + thread.lane() * kWidth, 32 * kWidth}, x);

    float maximum = -INFINITY;
    float* maxima = args.reduced.maxima + (row * args.row_chunks + chunk) * (kChunk / Group);
    constexpr int kGroupLanes = Group / kWidth;
    for (int v = 0; v < kVectors; ++v) {
      float of_group = x[v][0];
      for (int i = 1; i < kWidth; ++i) of_group = max_or_nan(of_group, x[v][i]);
      for (int mask = 1; mask < kGroupLanes; mask *= 2) {
        of_group = max_or_nan(of_group, thread.shuffle_xor(of_group, mask));
      }
      if (thread.lane() % kGroupLanes == 0) maxima[(v * 32 + thread.lane()) / kGroupLanes] = of_group;
      maximum = max_or_nan(maximum, of_group);
    }
    if constexpr (WithSums) {
      for (int mask = kGroupLanes; mask < 32; mask *= 2) {
        maximum = max_or_nan(maximum, thread.shuffle_xor(maximum, mask));
      }
      store_sums(thread, args, row, chunk, x, maximum);
    }
  }

 private:
  static GGRO_DEVICE void store_sums(const Thread& thread, const Args& args, int64_t row, int64_t chunk,
                                     float (&x)[kVectors][kWidth], float maximum) {
    float m = maximum;
    if (args.temperature != 1.0f) {
      m /= args.temperature;
      for (int v = 0; v < kVectors; ++v) {
        for (int i = 0; i < kWidth; ++i) x[v][i] /= args.temperature;
      }
    }
    float s = 0.0f, t = 0.0f;
    for (int v = 0; v < kVectors; ++v) {
      for (int i = 0; i < kWidth; ++i) {
        // Where m is infinite or NaN, nothing but m is looked at later. The bound keeps -inf * 0 out; e^-1000 is 0.
        const float shifted = fmaxf(x[v][i] - m, -1000.0f);
        const float power = expf(shifted);
        s += power;
        t += shifted * power;
      }
    }
    s = sum_of_lanes(thread, s);
    t = sum_of_lanes(thread, t);
    if (thread.lane() == 0) {
      const int64_t stride = args.reduced.chunks;
      float* sums = args.reduced.sums + row * 3 * stride + args.first_chunk + chunk;
      sums[0] = m;
      sums[stride] = s;
      sums[2 * stride] = t;
    }
  }
};

template <typename T>
struct SelectArgs {
  const T* logits;
  int64_t row_stride;
  int columns;
  int k;
  Reduced reduced;                // of these columns; maxima null: the columns are searched whole
  int groups;                     // maxima a row
  int64_t first_column;           // added to the indices
  const int64_t* column_indices;  // [rows, columns] of the logits' strides: they stand in for the indices; or null
  T* values;
  int64_t* indices;
  int64_t output_stride;
  float* entropy;    // [rows], from the sums of all chunks; or null
  float* logsumexp;  // [rows]
};

template <typename T>
struct SelectKernel {
  using Args = SelectArgs<T>;
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;

  static int shared_bytes(int columns, int k, bool grouped) {
    const int candidates = grouped ? static_cast<int>(searched_whole(k)) : columns;
    return BlockCounts<kThreads>::kSharedBytes + shared_bytes_of<uint32_t>(candidates) + shared_bytes_of<uint64_t>(k) +
           shared_bytes_of<int>(k) + shared_bytes_of<float>(3 * kWarps);
  }

  static GGRO_DEVICE void run(Thread& thread, const Args& args) {
    constexpr int kBits = 32 - kUnusedKeyBits<T>;
    const int64_t row = thread.block();
    const T* logits = args.logits + row * args.row_stride;
    const bool grouped = args.reduced.maxima != nullptr;
    const int group = group_of(args.k);
    const int candidates = grouped ? group * args.k : args.columns;
    BlockCounts<kThreads> block(thread);
    const Shared<uint32_t> keys = thread.shared<uint32_t>(candidates);
    const Shared<uint64_t> best = thread.shared<uint64_t>(args.k);
    const Shared<int> groups = thread.shared<int>(args.k);
    const Shared<float> warps = thread.shared<float>(3 * kWarps);
    thread.wait_for_previous_kernel();

    if (grouped) {
      const float* maxima = args.reduced.maxima + row * args.groups;
      take_largest(
          thread, block, args.groups, args.k, kBits, [&](int i) { return order_key(maxima[i]) >> kUnusedKeyBits<T>; },
          [&](int place, int i) { groups.store(place, i); });
      thread.sync();
    }
    const auto column_of = [&](int i) { return grouped ? groups.load(i / group) * group + i % group : i; };
    for (int i = thread.index(); i < candidates; i += kThreads) {
      const int column = column_of(i);
      keys.store(i, column < args.columns ? order_key(logits[column]) : 0);
    }
    thread.sync();
    take_largest(
        thread, block, candidates, args.k, kBits, [&](int i) { return keys.load(i); },
        [&](int place, int i) {
          best.store(place, static_cast<uint64_t>(keys.load(i)) << 32 | ~static_cast<uint32_t>(column_of(i)));
        });
    thread.sync();

    for (int i = thread.index(); i < args.k; i += kThreads) {
      const uint64_t mine = best.load(i);
      int rank = 0;
      for (int j = 0; j < args.k; ++j) rank += best.load(j) > mine;
      const auto column = static_cast<int>(~static_cast<uint32_t>(mine));
      const int64_t place = row * args.output_stride + rank;
      args.values[place] = logits[column];
      args.indices[place] = args.column_indices == nullptr ? args.first_column + column
                                                           : args.column_indices[row * args.row_stride + column];
    }
    if (args.entropy != nullptr) store_statistics(thread, args, row, warps);
  }

 private:
  static GGRO_DEVICE void store_statistics(const Thread& thread, const Args& args, int64_t row,
                                           const Shared<float>& warps) {
    const int64_t chunks = args.reduced.chunks;
    const float* sums = args.reduced.sums + row * 3 * chunks;
    float m = -INFINITY;
    for (int64_t i = thread.index(); i < chunks; i += kThreads) m = max_or_nan(m, sums[i]);
    for (int mask = 1; mask < 32; mask *= 2) m = max_or_nan(m, thread.shuffle_xor(m, mask));
    if (thread.lane() == 0) warps.store(thread.warp(), m);
    thread.sync();
    for (int warp = 0; warp < kWarps; ++warp) m = max_or_nan(m, warps.load(warp));

    float s = 0.0f, t = 0.0f;
    for (int64_t i = thread.index(); i < chunks; i += kThreads) {
      if (sums[i] == -INFINITY) continue;
      const float shift = sums[i] - m, factor = expf(shift);
      s += factor * sums[chunks + i];
      t += factor * (sums[2 * chunks + i] + shift * sums[chunks + i]);
    }
    s = sum_of_lanes(thread, s);
    t = sum_of_lanes(thread, t);
    if (thread.lane() == 0) {
      warps.store(kWarps + thread.warp(), s);
      warps.store(2 * kWarps + thread.warp(), t);
    }
    thread.sync();
    if (thread.index() != 0) return;
    s = t = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      s += warps.load(kWarps + warp);
      t += warps.load(2 * kWarps + warp);
    }
    const bool finite = m - m == 0.0f;
    args.logsumexp[row] = finite ? m + logf(s) : m;
    args.entropy[row] = finite ? logf(s) - t / s : NAN;
  }
};

template <typename T>
void reduce(const char* name, const ReduceArgs<T>& args, int64_t k, const Stream& stream) {
  const auto with = [&](auto kernel) {
    using Kernel = decltype(kernel);
    launch<Kernel>(name, divide_up(args.rows * args.row_chunks, Kernel::kThreads / 32), 0, args, stream);
  };
  const bool wide = group_of(k) == 64, sums = args.reduced.sums != nullptr;
  if (wide && sums) with(ReduceKernel<T, 64, true>());
  if (wide && !sums) with(ReduceKernel<T, 64, false>());
  if (!wide && sums) with(ReduceKernel<T, 32, true>());
  if (!wide && !sums) with(ReduceKernel<T, 32, false>());
}

// After a launch of ours in any case where `overlaps`.
template <typename T>
void select(const char* name, int64_t rows, const SelectArgs<T>& args, bool overlaps, const Stream& stream) {
  using Kernel = SelectKernel<T>;
  launch<Kernel>(name, rows, Kernel::shared_bytes(args.columns, args.k, args.reduced.maxima != nullptr), args, stream,
                 overlaps);
}

}  // namespace ggro::cuda
