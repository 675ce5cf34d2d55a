#pragma once

#include "attention_rows.h"

// The two products of attention and the softmax between them, of the 16 rows of a warp and a tile of keys in shared
// memory.
//
// Lane 4 * g + p holds scores s[n][i] of row g + i / 2 * 8 and key 8 * n + 2 * p + i % 2, as the tensor cores leave
// them, for either kind of product.

namespace ggro::cuda {

constexpr int kWarpRows = 16;
constexpr int kScoreTiles = kTileKeys / 8;
using Scores = float[kScoreTiles][4];

// The keys of a tile that the two rows of a lane see.
struct Seen {
  int first[2];
  int end[2];

  GGRO_DEVICE bool operator()(int half, int key) const { return key >= first[half] && key < end[half]; }
  GGRO_DEVICE bool any(int half) const { return first[half] < kTileKeys && end[half] > 0 && first[half] < end[half]; }
  GGRO_DEVICE bool all(int half) const { return first[half] <= 0 && end[half] >= kTileKeys; }
};

// Scores become weights 2^(score - max) relative to the new maximum of a row; `rescale` brings to it what is relative
// to the one before. `sum`: of the keys that the lane scores.
GGRO_DEVICE void scores_to_weights(const Thread& thread, float factor, float cap, const Seen& seen, Scores& s,
                                   float (&max)[2], float (&sum)[2], float (&rescale)[2]) {
  if (cap == 0.0f) {
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = product(s[n][i], factor);
    }
  } else {
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = capped(s[n][i], factor, cap);
    }
  }
  if (thread.ballot(!seen.all(0) || !seen.all(1)) != 0) {
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!seen(i / 2, 8 * n + thread.lane() % 4 * 2 + i % 2)) s[n][i] = -INFINITY;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float maximum = max[half];
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) maximum = fmaxf(maximum, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    maximum = fmaxf(maximum, thread.shuffle_xor(maximum, 1));
    maximum = fmaxf(maximum, thread.shuffle_xor(maximum, 2));
    const float shift = shift_of(maximum);
    rescale[half] = power_of_two(max[half] - shift);
    max[half] = maximum;
    float total = 0.0f;
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[n][i] = power_of_two(s[n][i] - shift);
        total += s[n][i];
      }
    }
    sum[half] = fmaf(sum[half], rescale[half], total);
  }
}

// fp32 by fused multiply-adds. P: columns that a tile in shared memory has room for.
template <typename T, int P>
struct Products {
  static_assert(sizeof(T) == 4);
  // Rows in shared memory begin 16 bytes further on, modulo all banks, each.
  static constexpr int kStride = P + 4;
  static constexpr bool kCounts = false;
  static constexpr int kWeightStride = kTileKeys + 4;
  static constexpr int kWeights = kWarpRows * kWeightStride;
  static constexpr int kAccumulators = P / 8;
  using Accumulators = float[kAccumulators][4];

  // Four accumulators belong to consecutive columns of one row.
  static constexpr int kConsecutive = 4;
  static GGRO_DEVICE int half_of(int j, int) { return j % 2; }
  static GGRO_DEVICE int column_of(const Thread& thread, int j, int) { return j / 2 * 16 + thread.lane() % 4 * 4; }

  static GGRO_DEVICE void add_scores(const Thread& thread, const Shared<T>& queries, int query, const Shared<T>& tile,
                                     int key, Scores& s) {
    query += thread.lane() / 4 * kStride;
    key += thread.lane() % 4 * 2 * kStride;
#pragma unroll 1
    for (int column = 0; column < P; column += 4) {
      const Vector<float, 4> q[2] = {queries.template load_vector<4>(query + column),
                                     queries.template load_vector<4>(query + 8 * kStride + column)};
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          const Vector<float, 4> k = tile.template load_vector<4>(key + (8 * n + next) * kStride + column);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            s[n][next] = fmaf(q[0].data[c], k.data[c], s[n][next]);
            s[n][2 + next] = fmaf(q[1].data[c], k.data[c], s[n][2 + next]);
          }
        }
      }
    }
  }

  // `exact`: what a row does not see, it does not get zero times.
  static GGRO_DEVICE void add_values(const Thread& thread, const Scores& s, const Shared<float>& weights,
                                     const Shared<T>& tile, int first, const Seen& seen, bool exact,
                                     Accumulators& acc) {
    const int row = thread.warp() * kWeights + thread.lane() / 4 * kWeightStride;
    const int base = first + thread.lane() % 4 * 4;
    thread.sync_warp();
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      const int place = row + 8 * n + thread.lane() % 4 * 2;
      weights.template store_vector<2>(place, {{s[n][0], s[n][1]}});
      weights.template store_vector<2>(place + 8 * kWeightStride, {{s[n][2], s[n][3]}});
    }
    thread.sync_warp();
#pragma unroll 1
    for (int key = 0; key < kTileKeys; key += 4) {
      const Vector<float, 4> w[2] = {weights.load_vector<4>(row + key),
                                     weights.load_vector<4>(row + 8 * kWeightStride + key)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool counts[2] = {!exact || seen(0, key + i), !exact || seen(1, key + i)};
#pragma unroll
        for (int j = 0; j < P / 16; ++j) {
          const Vector<float, 4> v = tile.template load_vector<4>(base + (key + i) * kStride + j * 16);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if (counts[0]) acc[2 * j][c] = fmaf(w[0].data[i], v.data[c], acc[2 * j][c]);
            if (counts[1]) acc[2 * j + 1][c] = fmaf(w[1].data[i], v.data[c], acc[2 * j + 1][c]);
          }
        }
      }
    }
  }
};

// Half precision by the tensor cores: products and sums in fp32, weights rounded to the dtype.
template <typename T, int P>
struct HalfProducts {
  static constexpr int kStride = P + 8;
  static constexpr bool kCounts = true;
  static constexpr int kWeights = 0;
  static constexpr int kAccumulators = P / 8;
  using Accumulators = float[kAccumulators][4];

  // Two accumulators belong to consecutive columns of one row.
  static constexpr int kConsecutive = 2;
  static GGRO_DEVICE int half_of(int, int i) { return i / 2; }
  static GGRO_DEVICE int column_of(const Thread& thread, int j, int) { return j * 8 + thread.lane() % 4 * 2; }

  static GGRO_DEVICE void add_scores(const Thread& thread, const Shared<T>& queries, int query, const Shared<T>& tile,
                                     int key, Scores& s) {
    const int lane = thread.lane();
    query += lane % 16 * kStride + lane / 16 * 8;
    key += (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int column = 0; column < P; column += 16) {
      uint32_t a[4];
      thread.load_matrices<false>(queries, query + column, a);
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        uint32_t b[4];
        thread.load_matrices<false>(tile, key + n * 8 * kStride + column, b);
        thread.multiply_add_16x8x16<T>(s[n], a, {b[0], b[1]});
        thread.multiply_add_16x8x16<T>(s[n + 1], a, {b[2], b[3]});
      }
    }
  }

  static GGRO_DEVICE void add_values(const Thread& thread, const Scores& s, const Shared<float>&, const Shared<T>& tile,
                                     int first, const Seen&, bool, Accumulators& acc) {
#pragma unroll
    for (int n = 0; n < kScoreTiles; n += 2) {
      const uint32_t a[4] = {pair(s[n][0], s[n][1]), pair(s[n][2], s[n][3]), pair(s[n + 1][0], s[n + 1][1]),
                             pair(s[n + 1][2], s[n + 1][3])};
#pragma unroll
      for (int j = 0; j < kAccumulators; j += 2) {
        uint32_t b[4];
        load_values(thread, tile, first, n, j, b);
        thread.multiply_add_16x8x16<T>(acc[j], a, {b[0], b[1]});
        thread.multiply_add_16x8x16<T>(acc[j + 1], a, {b[2], b[3]});
      }
    }
  }

  // Zero times an infinite value is NaN, so that a row gets it from values which only others see. Where that happened,
  // zeros stand for what is not finite, and what a row sees of it is counted: in a tile of `code`.
  static constexpr float kMinus = 128.0f, kNaN = 16384.0f;

  static GGRO_DEVICE T code(T value) {
    const float x = to_float(value);
    return from_float<T>(fabsf(x) < INFINITY ? 0.0f : x == INFINITY ? 1.0f : x == -INFINITY ? kMinus : kNaN);
  }

  static GGRO_DEVICE void add_infinities(const Thread& thread, const Scores& s, const Shared<T>& codes, int first,
                                         const Seen& seen, Accumulators& acc) {
    uint32_t sees[kScoreTiles][2];
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = 8 * n + thread.lane() % 4 * 2;
        float counts[2];
        // A weight of zero times infinity is NaN to those who see it.
        for (int i = 0; i < 2; ++i) counts[i] = !seen(half, key + i) ? 0.0f : s[n][2 * half + i] > 0.0f ? 1.0f : kNaN;
        sees[n][half] = pair(counts[0], counts[1]);
      }
    }
#pragma unroll
    for (int j = 0; j < kAccumulators; j += 2) {
      float found[2][4] = {};
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        uint32_t b[4];
        load_values(thread, codes, first, n, j, b);
        const uint32_t a[4] = {sees[n][0], sees[n][1], sees[n + 1][0], sees[n + 1][1]};
        thread.multiply_add_16x8x16<T>(found[0], a, {b[0], b[1]});
        thread.multiply_add_16x8x16<T>(found[1], a, {b[2], b[3]});
      }
#pragma unroll
      for (int next = 0; next < 2; ++next) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float count = found[next][i];
          acc[j + next][i] = count > 0.0f ? acc[j + next][i] + infinity_of(count) : acc[j + next][i];
        }
      }
    }
  }

 private:
  static GGRO_DEVICE float infinity_of(float count) {
    const bool only_minus = count < kNaN && static_cast<int>(count) % static_cast<int>(kMinus) == 0;
    return count < kMinus ? INFINITY : only_minus ? -INFINITY : NAN;
  }

  static GGRO_DEVICE uint32_t pair(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
  }

  // Keys 8 * n .. 8 * n + 15, columns 8 * j .. 8 * j + 15.
  static GGRO_DEVICE void load_values(const Thread& thread, const Shared<T>& tile, int first, int n, int j,
                                      uint32_t (&b)[4]) {
    const int lane = thread.lane();
    thread.load_matrices<true>(tile, first + (8 * n + lane % 16) * kStride + 8 * j + lane / 16 * 8, b);
  }
};

template <int P>
struct Products<BFloat16, P> : HalfProducts<BFloat16, P> {};
template <int P>
struct Products<Float16, P> : HalfProducts<Float16, P> {};

}  // namespace ggro::cuda
