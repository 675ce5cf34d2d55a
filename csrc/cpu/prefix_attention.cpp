#include "ggro/prefix_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <type_traits>

#include "attention_branches.h"
#include "counts.h"
#include "dtypes.h"
#include "gemm.h"
#include "kernels.h"
#include "narrow.h"
#include "simd.h"
#include "threads.h"

// Floor: 2 (N + T) Hkv D elements read once, 2 Hq T N D multiply-adds for the scores and as many for the values, Hq T N
// exponentials; branches add what little they see of each other. With few query rows it is bound by the read, with many
// by the multiply-adds: from about 8 rows for each key head in fp32 with AVX-512. On top of it keys are packed
// once for every kMaxRows rows, values of half precision widened likewise.
namespace ggro::cpu {
namespace {

// Keys are taken in tiles of this many, counted from the first token of the prefix and of the branch.
constexpr int64_t kTileKeys = 128;
constexpr int64_t kMaxRows = 128;

// Of longer prefixes the next head's keys would drive its values out of the cache.
constexpr int64_t kFetchedKeys = 2 * kTileKeys;

// Scores of a row, with room to work on whole vectors that begin at any of them.
constexpr int64_t kScoreStride = kTileKeys + kLanes;

// Multiply-adds.
constexpr int64_t kMinWorkPerThread = 1 << 18;

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <typename T>
void copy_units(const T* x, int64_t width, float* out) {
  widen(x, width, out);
}

template <typename T>
void copy_units(const T* x, int64_t width, BFloat16Pair* out) {
  for (int64_t i = 0; 2 * i < width; ++i) out[i] = load_unit(x, i, width, BFloat16Pair());
}

// Up to this many rows the keys are transposed in registers.
constexpr int kFewRows = 8;

// Attention of up to kMaxRows queries that read one key head, under one running softmax over every segment.
// Row r of a key head is token r / group, query head r % group of its group: neighbours see nearly the same keys.
template <typename T>
class QueryTile {
  using Unit = ProductUnit<T, T>;
  static_assert(sizeof(Unit) == sizeof(float));

 public:
  QueryTile(const PrefixAttentionArgs& args, int64_t rows)
      : args_(args),
        group_(args.query_heads / args.key_heads),
        units_(count_units<Unit>(args.key_width)),
        padded_width_(round_up(args.value_width, kTileColumns)),
        ahead_(args.prefix_tokens <= kFetchedKeys ? args.prefix_key.head_stride
                                                  : kTileKeys * args.prefix_key.token_stride) {
    const int64_t floats =
        rows * (units_ + kScoreStride + 1 + kLanes + padded_width_) + kTileColumns * units_ + kTileKeys * padded_width_;
    constexpr int64_t kParts = 7;
    scratch_.reset(new float[static_cast<size_t>(floats + (kParts + 1) * kLanes)]);
    // Aligned to vectors, so that no load crosses a cache line.
    float* next =
        reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(scratch_.get()), kLanes * sizeof(float)));
    const auto take = [&next](int64_t floats) {
      float* taken = next;
      next += round_up(floats, kLanes);
      return taken;
    };
    queries_ = reinterpret_cast<Unit*>(take(rows * units_));
    packed_keys_ = reinterpret_cast<Unit*>(take(kTileColumns * units_));
    widened_values_ = take(kTileKeys * padded_width_);
    scores_ = take(rows * kScoreStride);
    maxima_ = take(rows);
    sums_ = take(rows * kLanes);
    output_ = take(rows * padded_width_);
    std::fill_n(widened_values_, kTileKeys * padded_width_, 0.0f);
  }

  void attend(int64_t batch, int64_t key_head, int64_t first_row, int64_t end_row) {
    start(batch, key_head, first_row, end_row);
    const int64_t rows = end_row - first_row;
    const int64_t* starts = args_.branch_starts + batch * args_.tokens;
    const int64_t length = prefix_length(args_, batch);
    for (int r = 0; r < rows; ++r) {
      const int64_t token = (first_row + r) / group_;
      visible_[r] = {std::max<int64_t>(0, length + end_of(args_, batch, token) - starts[token] + 1 - args_.window),
                     length};
    }
    attend_segment(segment<T>(args_.prefix_key, args_.prefix_value, batch, key_head), 0, rows);
    attend_branches(segment<T>(args_.branch_key, args_.branch_value, batch, key_head), batch, first_row, end_row);
    finish(batch, key_head, first_row, end_row);
  }

 private:
  void start(int64_t batch, int64_t key_head, int64_t first_row, int64_t end_row) {
    for (int64_t row = first_row; row < end_row; ++row) {
      const T* query = static_cast<const T*>(args_.query.data) + batch * args_.query.batch_stride +
                       (key_head * group_ + row % group_) * args_.query.head_stride +
                       row / group_ * args_.query.token_stride;
      copy_units(query, args_.key_width, queries_ + (row - first_row) * units_);
    }
    const int64_t rows = end_row - first_row;
    std::fill_n(maxima_, rows, -kInfinity);
    std::fill_n(sums_, rows * kLanes, 0.0f);
    std::fill_n(output_, rows * padded_width_, 0.0f);
  }

  void finish(int64_t batch, int64_t key_head, int64_t first_row, int64_t end_row) {
    for (int64_t row = first_row; row < end_row; ++row) {
      T* out = static_cast<T*>(args_.output) +
               ((batch * args_.tokens + row / group_) * args_.query_heads + key_head * group_ + row % group_) *
                   args_.value_width;
      const float* accumulated = output_ + (row - first_row) * padded_width_;
      const float sum = horizontal_sum(load(sums_ + (row - first_row) * kLanes));
      for (int64_t i = 0; i < args_.value_width; ++i) out[i] = from_float<T>(accumulated[i] / sum);
    }
  }

  void attend_branches(const Segment<T>& branches, int64_t batch, int64_t first_row, int64_t end_row) {
    const int64_t first_token = first_row / group_, end_token = (end_row - 1) / group_ + 1;
    const int64_t* starts = args_.branch_starts + batch * args_.tokens;
    const int64_t base = *std::min_element(starts + first_token, starts + end_token);
    int64_t last = 0;
    for (int64_t token = first_token; token < end_token; ++token) last = std::max(last, end_of(args_, batch, token));
    // Short branches are scored together, though most of these scores are of keys that a row does not see.
    const bool together = last + 1 - base <= kTileKeys;
    if (together) score(branches.from(base), last + 1 - base, 0, static_cast<int>(end_row - first_row));
    for (int64_t token = first_token, next; token < end_token; token = next) {
      const int64_t start = starts[token];
      const int first = static_cast<int>(std::max<int64_t>(0, token * group_ - first_row));
      int end = first;
      int64_t keys = 0;
      for (next = token; next < end_token && starts[next] == start; ++next) {
        const int64_t seen = end_of(args_, batch, next) - start + 1;
        keys = std::max(keys, seen);
        for (; end < std::min((next + 1) * group_, end_row) - first_row; ++end) {
          visible_[end] = {std::max<int64_t>(0, seen - args_.window), seen};
        }
      }
      if (together) {
        weigh(branches.from(start), 0, keys, first, end, start - base);
      } else {
        attend_segment(branches.from(start), first, end);
      }
    }
  }

  // The keys in visible_ of rows first .. end - 1.
  void attend_segment(const Segment<T>& segment, int first, int end) {
    Range seen = visible_[first];
    for (int r = first; r < end; ++r) {
      seen = {std::min(seen.first, visible_[r].first), std::max(seen.end, visible_[r].end)};
    }
    for (int64_t key = seen.first / kTileKeys * kTileKeys; key < seen.end; key += kTileKeys) {
      attend_keys(segment.from(key), key, std::min(kTileKeys, seen.end - key), first, end);
    }
  }

  // What row r sees of the tile of keys that begins at `key`.
  Range visible_in_tile(int r, int64_t key) const {
    return {std::max<int64_t>(0, visible_[r].first - key), std::min(kTileKeys, visible_[r].end - key)};
  }

  bool sees_nothing(int r, int64_t key) const {
    const Range range = visible_in_tile(r, key);
    return range.first >= range.end;
  }

  void attend_keys(const Segment<T>& tile, int64_t key, int64_t keys, int first, int end) {
    while (first < end && sees_nothing(first, key)) ++first;
    while (first < end && sees_nothing(end - 1, key)) --end;
    if (first == end) return;
    score(tile, keys, first, end);
    weigh(tile, key, keys, first, end, 0);
  }

  // Scores of rows first .. end - 1, up to their scale.
  void score(const Segment<T>& tile, int64_t keys, int first, int end) {
    if (end - first <= kFewRows) {
      with_count<kFewRows>(end - first, [&](auto rows) { score_few_rows<rows>(tile, keys, first); });
    } else {
      for (int64_t column = 0; column < keys; column += kTileColumns) {
        pack_transposed<kTileVectors, Unit>(tile.keys + column * tile.key_stride, tile.key_stride, keys - column,
                                            args_.key_width, packed_keys_, kTileColumns);
        for (int r = first; r < end; r += kTileRows) {
          multiply_tile(queries_ + r * units_, units_, std::min(kTileRows, end - r), packed_keys_, kTileColumns, units_,
                        scores_ + r * kScoreStride + column, kScoreStride, false);
        }
      }
    }
  }

  // Takes the keys from `key` on, whose scores begin at a column of scores_, into the softmax and the output.
  void weigh(const Segment<T>& tile, int64_t key, int64_t keys, int first, int end, int64_t column) {
    float* scores = scores_ + column;
    for (int r = first; r < end; ++r) {
      if (!sees_nothing(r, key)) scores_to_weights(r, visible_in_tile(r, key), scores + r * kScoreStride);
    }
    add_values(tile, key, keys, first, end, scores);
  }

  // Replaces the scores of row r by 2^(score - maximum), and brings its sums to the new maximum.
  void scores_to_weights(int r, Range range, float* scores) {
    const int64_t width = round_up(range.end, kLanes);
    if (args_.softcap == 0) {
      const Vec scale = broadcast(args_.scale * kLog2E<float>);
      for (int64_t i = 0; i < width; i += kLanes) store(scores + i, mul(load(scores + i), scale));
    } else {
      const Vec scale = broadcast(args_.scale / args_.softcap);
      const Vec softcap = broadcast(args_.softcap * kLog2E<float>);
      for (int64_t i = 0; i < width; i += kLanes) store(scores + i, mul(tanh(mul(load(scores + i), scale)), softcap));
    }
    std::fill(scores, scores + range.first, -kInfinity);
    std::fill(scores + range.end, scores + width, -kInfinity);
    Vec maxima = broadcast(maxima_[r]);
    for (int64_t i = 0; i < width; i += kLanes) maxima = max(load(scores + i), maxima);
    const float maximum = horizontal_max(maxima);
    if (maximum > maxima_[r]) {
      if (maxima_[r] != -kInfinity) rescale(r, maxima_[r] - maximum);
      maxima_[r] = maximum;
    }
    // Scores that are all -inf have no finite difference from their maximum.
    const Vec shift = broadcast(maximum == -kInfinity ? 0.0f : maximum);
    const Vec floor = broadcast(kExp2Floor);
    Vec sums = load(sums_ + r * kLanes);
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec weights = exp2_nonpositive(max(floor, sub(load(scores + i), shift)));
      store(scores + i, weights);
      sums = add(sums, weights);
    }
    store(sums_ + r * kLanes, sums);
  }

  void rescale(int r, float exponent) {
    const Vec factor = exp2_nonpositive(max(broadcast(kExp2Floor), broadcast(exponent)));
    store(sums_ + r * kLanes, mul(load(sums_ + r * kLanes), factor));
    float* output = output_ + r * padded_width_;
    for (int64_t i = 0; i < padded_width_; i += kLanes) store(output + i, mul(load(output + i), factor));
  }

  // Few rows wait for memory, not for arithmetic, and a decode step finds no layer's keys and values in a cache.
  static void prefetch(const T* rows, int64_t stride, int64_t width) {
    constexpr int64_t kLineElements = kCacheLine / sizeof(T);
    for (int i = 0; i < kLanes; ++i) {
      for (int64_t j = 0; j < width; j += kLineElements) __builtin_prefetch(rows + i * stride + j, 0, 2);
    }
  }

  // As score, with the keys transposed in registers: packing them would cost few rows as much as the product.
  template <int kRows>
  void score_few_rows(const Segment<T>& tile, int64_t keys, int first) {
    for (int64_t column = 0; column < keys; column += kLanes) {
      prefetch(tile.values + column * tile.value_stride, tile.value_stride, args_.value_width);
      prefetch(tile.keys + column * tile.key_stride + ahead_, tile.key_stride, args_.key_width);
      multiply_transposed<kRows>(queries_ + first * units_, units_, tile.keys + column * tile.key_stride,
                                 tile.key_stride, keys - column, args_.key_width,
                                 scores_ + first * kScoreStride + column, kScoreStride);
    }
  }

  void add_values(const Segment<T>& tile, int64_t key, int64_t keys, int first, int end, const float* weights) {
    // Widening to scratch pays off where several tiles of rows read it; a row may not be read beyond its end.
    if (padded_width_ == args_.value_width && (std::is_same_v<T, float> || end - first <= kTileRows)) {
      return add_values(tile.values, tile.value_stride, key, first, end, weights);
    }
    for (int64_t i = 0; i < keys; ++i) {
      widen(tile.values + i * tile.value_stride, args_.value_width, widened_values_ + i * padded_width_);
    }
    add_values(widened_values_, padded_width_, key, first, end, weights);
  }

  template <typename V>
  void add_values(const V* values, int64_t stride, int64_t key, int first, int end, const float* weights) {
    for (int64_t column = 0; column < padded_width_; column += kTileColumns) {
      for (int r = first, rows; r < end; r += rows) {
        // Rows that see the same keys together. A weight of zero is not enough: what a row does not see may be NaN.
        const Range range = visible_in_tile(r, key);
        for (rows = 1; rows < kTileRows && r + rows < end; ++rows) {
          const Range other = visible_in_tile(r + rows, key);
          if (other.first != range.first || other.end != range.end) break;
        }
        if (range.first >= range.end) continue;
        multiply_tile(weights + r * kScoreStride + range.first, kScoreStride, rows,
                      values + range.first * stride + column, stride, range.end - range.first,
                      output_ + r * padded_width_ + column, padded_width_, true);
      }
    }
  }

  const PrefixAttentionArgs& args_;
  const int64_t group_;
  const int64_t units_;
  const int64_t padded_width_;
  // How far from those in use the keys lie that are fetched: in the next tile, or at the same place of the next head.
  const int64_t ahead_;
  std::unique_ptr<float[]> scratch_;
  Unit* queries_;
  Unit* packed_keys_;
  float* widened_values_;
  float* scores_;
  float* maxima_;
  float* sums_;
  float* output_;
  Range visible_[kMaxRows];
};

template <typename T>
void run(const PrefixAttentionArgs& args) {
  const int64_t heads = args.batch * args.key_heads;
  const int64_t rows = args.tokens * (args.query_heads / args.key_heads);
  if (heads * rows == 0) return;
  const int64_t work = heads * rows * (args.prefix_tokens + args.branch_tokens) * (args.key_width + args.value_width);
  int64_t threads = thread_count(args.num_threads, heads * rows, work, kMinWorkPerThread);
  // Tiles as few as possible, since each reads the keys anew, but no thread without work.
  int64_t tiles = (rows + kMaxRows - 1) / kMaxRows;
  while (heads * tiles % threads != 0 && heads * tiles < 4 * threads && tiles < rows) ++tiles;
  int64_t tile_rows = (rows + tiles - 1) / tiles;
  if (tile_rows > kTileRows) tile_rows = std::min(kMaxRows, round_up(tile_rows, kTileRows));
  tiles = (rows + tile_rows - 1) / tile_rows;
  threads = std::min(threads, heads * tiles);
  std::atomic<int64_t> next{0};
#ifdef _OPENMP
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static, 1) if (threads > 1)
#endif
  for (int64_t thread = 0; thread < threads; ++thread) {
    QueryTile<T> tile(args, tile_rows);
    for (int64_t i = next++; i < heads * tiles; i = next++) {
      const int64_t head = i / tiles, first = i % tiles * tile_rows;
      tile.attend(head / args.key_heads, head % args.key_heads, first, std::min(rows, first + tile_rows));
    }
  }
}

}  // namespace

namespace GGRO_ISA {

void prefix_attention(const PrefixAttentionArgs& args) {
  check_branches(args);
  with_dtype(args.dtype, [&](auto type) { run<decltype(type)>(args); });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
