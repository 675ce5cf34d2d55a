#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "attention_branches.h"
#include "counts.h"
#include "dtypes.h"
#include "gemm.h"
#include "ggro/prefix_attention.h"
#include "kernels.h"
#include "narrow.h"
#include "simd.h"
#include "threads.h"

// Floor: 2 (N + T) Hkv D elements read once; 3 Hq T N D multiply-adds, for the scores, for what reaches the weights
// and for the queries, since nothing of the forward pass is kept; the branches add five products of what little they
// see of each other.
namespace ggro::cpu {
namespace {

// Rows of queries that share the scratch, of so many scores at most unless the fewest have more.
constexpr int64_t kMaxRows = 120;
constexpr int64_t kMaxScores = 1 << 16;
static_assert(kMaxRows % kTileRows == 0);

// Keys that are multiplied while they are in the first-level cache.
constexpr int64_t kTileKeys = 128;

// Up to this many rows what they are multiplied with is transposed in registers.
constexpr int kFewRows = 8;

// Multiply-adds.
constexpr int64_t kMinWorkPerThread = 1 << 18;

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Rows of consecutive tokens of one branch, which starts at a token and of which they see `seen` tokens at most.
struct Run {
  int64_t first;
  int64_t end;
  int64_t start;
  int64_t seen;
};

// Gradients of one key head after another. Row r is token r / group, query head r % group of its group, as in the
// forward pass. A row of scores has a column for each key of the prefix, then, from prefix_columns_ on, one for each of
// its branch.
template <typename T>
class HeadGradients {
 public:
  explicit HeadGradients(const PrefixAttentionBackwardArgs& args)
      : args_(args),
        group_(args.query_heads / args.key_heads),
        key_columns_(round_up(args.key_width, kTileColumns)),
        value_columns_(round_up(args.value_width, kTileColumns)),
        prefix_columns_(round_up(args.prefix_tokens, kTileColumns)),
        columns_(prefix_columns_ + round_up(longest_branch(args), kTileColumns)),
        rows_(std::min(args.tokens * group_, std::clamp<int64_t>(kMaxScores / columns_, kTileRows, kMaxRows))) {
    const int64_t widest = std::max(key_columns_, value_columns_);
    const int64_t buffers = args.softcap == 0 ? 2 : 3;
    const int64_t floats = rows_ * (2 * key_columns_ + value_columns_ + buffers * columns_) +
                           args.branch_tokens * (key_columns_ + value_columns_) + kTileColumns * widest +
                           kTileKeys * widest;
    constexpr int64_t kParts = 10;
    scratch_.reset(new float[static_cast<size_t>(floats + (kParts + 1) * kLanes)]);
    // Aligned to vectors, so that no load crosses a cache line.
    float* next =
        reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(scratch_.get()), kLanes * sizeof(float)));
    const auto take = [&next](int64_t floats) {
      float* taken = next;
      next += round_up(floats, kLanes);
      return taken;
    };
    queries_ = take(rows_ * key_columns_);
    query_sums_ = take(rows_ * key_columns_);
    gradients_ = take(rows_ * value_columns_);
    weights_ = take(rows_ * columns_);
    slopes_ = take(rows_ * columns_);
    cap_slopes_ = args.softcap == 0 ? nullptr : take(rows_ * columns_);
    key_sums_ = take(args.branch_tokens * key_columns_);
    value_sums_ = take(args.branch_tokens * value_columns_);
    packed_ = take(kTileColumns * widest);
    widened_ = take(kTileKeys * widest);
    // The columns that pad rows stay zero.
    std::fill(scratch_.get(), next, 0.0f);
  }

  void compute(int64_t batch, int64_t key_head) {
    std::fill_n(key_sums_, args_.branch_tokens * key_columns_, 0.0f);
    std::fill_n(value_sums_, args_.branch_tokens * value_columns_, 0.0f);
    const int64_t total = args_.tokens * group_;
    for (int64_t row = 0; row < total; row += rows_) {
      add_rows(batch, key_head, row, std::min(rows_, total - row));
    }
    for (int64_t token = 0; token < args_.branch_tokens; ++token) {
      const int64_t place = (batch * args_.branch_tokens + token) * args_.key_heads + key_head;
      narrow(key_sums_ + token * key_columns_, args_.key_width,
             static_cast<T*>(args_.key_gradient) + place * args_.key_width);
      narrow(value_sums_ + token * value_columns_, args_.value_width,
             static_cast<T*>(args_.value_gradient) + place * args_.value_width);
    }
  }

 private:
  static int64_t longest_branch(const PrefixAttentionBackwardArgs& args) {
    int64_t longest = 1;
    for (int64_t b = 0; b < args.batch; ++b) {
      for (int64_t i = 0; i < args.tokens; ++i) {
        longest = std::max(longest, end_of(args, b, i) + 1 - args.branch_starts[b * args.tokens + i]);
      }
    }
    return longest;
  }

  void add_rows(int64_t batch, int64_t key_head, int64_t first_row, int64_t rows) {
    find_visible(batch, first_row, rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = (first_row + r) / group_, head = key_head * group_ + (first_row + r) % group_;
      widen(head_of<T>(args_.query, batch, head) + token * args_.query.token_stride, args_.key_width,
            queries_ + r * key_columns_);
      widen(head_of<T>(args_.gradient, batch, head) + token * args_.gradient.token_stride, args_.value_width,
            gradients_ + r * value_columns_);
    }

    const Range seen = seen_of_prefix(rows);
    const int64_t seen_tokens = seen.end - seen.first;
    const Segment<T> prefix = segment<T>(args_.prefix_key, args_.prefix_value, batch, key_head).from(seen.first);
    const Segment<T> branches = segment<T>(args_.branch_key, args_.branch_value, batch, key_head);
    const Rows next_head = {prefix.keys + args_.prefix_key.head_stride, prefix.key_stride, args_.key_width};
    multiply_keys(queries_, key_columns_, rows, keys_of(prefix), seen_tokens, weights_ + seen.first, values_of(prefix));
    multiply_keys(gradients_, value_columns_, rows, values_of(prefix), seen_tokens, slopes_ + seen.first, next_head);
    for (const Run& run : runs_) {
      const Segment<T> branch = branches.from(run.start);
      const int64_t place = run.first * columns_ + prefix_columns_;
      multiply_keys(queries_ + run.first * key_columns_, key_columns_, run.end - run.first, keys_of(branch), run.seen,
                    weights_ + place, values_of(branch));
      multiply_keys(gradients_ + run.first * value_columns_, value_columns_, run.end - run.first, values_of(branch),
                    run.seen, slopes_ + place, keys_of(branch));
    }
    for (int64_t r = 0; r < rows; ++r) to_weights_and_slopes(r);

    std::fill_n(query_sums_, rows * key_columns_, 0.0f);
    add_keys(slopes_ + seen.first, rows, prefix.keys, prefix.key_stride, seen_tokens, query_sums_);
    for (const Run& run : runs_) {
      const Segment<T> branch = branches.from(run.start);
      const int64_t place = run.first * columns_ + prefix_columns_;
      add_keys(slopes_ + place, run.end - run.first, branch.keys, branch.key_stride, run.seen,
               query_sums_ + run.first * key_columns_);
      add_to_branch(run, slopes_ + place, queries_ + run.first * key_columns_, key_columns_, key_sums_);
      add_to_branch(run, weights_ + place, gradients_ + run.first * value_columns_, value_columns_, value_sums_);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = (first_row + r) / group_, head = key_head * group_ + (first_row + r) % group_;
      narrow(query_sums_ + r * key_columns_, args_.key_width,
             static_cast<T*>(args_.query_gradient) +
                 ((batch * args_.tokens + token) * args_.query_heads + head) * args_.key_width);
    }
  }

  // Which columns each row sees, and the runs of rows.
  void find_visible(int64_t batch, int64_t first_row, int64_t rows) {
    const int64_t length = prefix_length(args_, batch);
    runs_.clear();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = (first_row + r) / group_;
      const int64_t start = args_.branch_starts[batch * args_.tokens + token];
      const int64_t seen = end_of(args_, batch, token) - start + 1;
      of_prefix_[r] = {std::min(length, std::max<int64_t>(0, length + seen - args_.window)), length};
      of_branch_[r] = {prefix_columns_ + std::max<int64_t>(0, seen - args_.window), prefix_columns_ + seen};
      if (runs_.empty() || runs_.back().start != start) runs_.push_back({r, r, start, 0});
      runs_.back().end = r + 1;
      runs_.back().seen = std::max(runs_.back().seen, seen);
    }
  }

  // What any of the rows sees: ranges that end together.
  Range seen_of_prefix(int64_t rows) const {
    Range seen = of_prefix_[0];
    for (int64_t r = 1; r < rows; ++r) seen.first = std::min(seen.first, of_prefix_[r].first);
    return seen;
  }

  // Keys, or values, of consecutive tokens.
  struct Rows {
    const T* data;
    int64_t stride;
    int64_t width;

    // A pass over all layers finds none of them in a cache, and waits for memory more than for arithmetic.
    void prefetch(int64_t first, int64_t count) const {
      constexpr int64_t kLineElements = kCacheLine / sizeof(T);
      for (int64_t i = first; i < first + count; ++i) {
        for (int64_t j = 0; j < width; j += kLineElements) __builtin_prefetch(data + i * stride + j, 0, 2);
      }
    }
  };

  Rows keys_of(const Segment<T>& segment) const { return {segment.keys, segment.key_stride, args_.key_width}; }
  Rows values_of(const Segment<T>& segment) const { return {segment.values, segment.value_stride, args_.value_width}; }

  // scores[r, i] = <a[r], x[i]> for i < count; what follows up to the next multiple of kTileColumns is overwritten.
  // As many rows of `next` are fetched meanwhile, or what lies there.
  void multiply_keys(const float* a, int64_t a_stride, int64_t rows, const Rows& x, int64_t count, float* scores,
                     const Rows& next) {
    if (rows <= kFewRows) {
      with_count<kFewRows>(rows, [&](auto few) {
        for (int64_t i = 0; i < count; i += kLanes) {
          next.prefetch(i, kLanes);
          multiply_transposed<few>(a, a_stride, x.data + i * x.stride, x.stride, count - i, x.width, scores + i,
                                   columns_);
        }
      });
      return;
    }
    for (int64_t i = 0; i < count; i += kTileColumns) {
      next.prefetch(i, kTileColumns);
      pack_transposed<kTileVectors, float>(x.data + i * x.stride, x.stride, count - i, x.width, packed_, kTileColumns);
      for (int64_t r = 0; r < rows; r += kTileRows) {
        multiply_tile(a + r * a_stride, a_stride, static_cast<int>(std::min<int64_t>(kTileRows, rows - r)), packed_,
                      kTileColumns, x.width, scores + r * columns_ + i, columns_, false);
      }
    }
  }

  // The softmax of a row of scores in place, and what reaches the scores where slopes_ has what reaches the weights.
  void to_weights_and_slopes(int64_t r) {
    float* weights = weights_ + r * columns_;
    float* slopes = slopes_ + r * columns_;
    float* cap_slopes = cap_slopes_ == nullptr ? nullptr : cap_slopes_ + r * columns_;
    cap(weights, cap_slopes);
    fill_unseen(r, weights, -kInfinity);
    Vec maxima = broadcast(-kInfinity);
    for (int64_t i = 0; i < columns_; i += kLanes) maxima = max(load(weights + i), maxima);
    const float maximum = horizontal_max(maxima);
    // Scores that are all -inf have no finite difference from their maximum.
    const Vec shift = broadcast(maximum == -kInfinity ? 0.0f : maximum);
    const Vec floor = broadcast(kExp2Floor);
    Vec sums = broadcast(0.0f);
    for (int64_t i = 0; i < columns_; i += kLanes) {
      const Vec weight = exp2_nonpositive(max(floor, sub(load(weights + i), shift)));
      store(weights + i, weight);
      sums = add(sums, weight);
    }
    const Vec sum = broadcast(horizontal_sum(sums));
    fill_unseen(r, slopes, 0.0f);
    Vec means = broadcast(0.0f);
    for (int64_t i = 0; i < columns_; i += kLanes) {
      const Vec weight = div(load(weights + i), sum);
      store(weights + i, weight);
      means = fma(weight, load(slopes + i), means);
    }
    const Vec mean = broadcast(horizontal_sum(means));
    const Vec scale = broadcast(args_.scale);
    for (int64_t i = 0; i < columns_; i += kLanes) {
      const Vec slope = mul(mul(load(weights + i), sub(load(slopes + i), mean)), scale);
      store(slopes + i, cap_slopes == nullptr ? slope : mul(slope, load(cap_slopes + i)));
    }
    // Where a row is NaN, zero times it is not zero.
    fill_unseen(r, weights, 0.0f);
    fill_unseen(r, slopes, 0.0f);
  }

  // Brings scores to their scale, in base 2; cap_slopes gets what tanh lets through.
  void cap(float* scores, float* cap_slopes) const {
    if (cap_slopes == nullptr) {
      const Vec scale = broadcast(args_.scale * kLog2E<float>);
      for (int64_t i = 0; i < columns_; i += kLanes) store(scores + i, mul(load(scores + i), scale));
      return;
    }
    const Vec scale = broadcast(args_.scale / args_.softcap);
    const Vec softcap = broadcast(args_.softcap * kLog2E<float>);
    const Vec one = broadcast(1.0f);
    for (int64_t i = 0; i < columns_; i += kLanes) {
      const Vec share = tanh(mul(load(scores + i), scale));
      store(scores + i, mul(share, softcap));
      store(cap_slopes + i, sub(one, mul(share, share)));
    }
  }

  void fill_unseen(int64_t r, float* row, float value) const {
    std::fill(row, row + of_prefix_[r].first, value);
    std::fill(row + of_prefix_[r].end, row + of_branch_[r].first, value);
    std::fill(row + of_branch_[r].end, row + columns_, value);
  }

  // sums[r] += sum over i < count of slopes[r, i] x[i].
  void add_keys(const float* slopes, int64_t rows, const T* x, int64_t stride, int64_t count, float* sums) {
    for (int64_t i = 0; i < count; i += kTileKeys) {
      const int64_t keys = std::min(kTileKeys, count - i);
      const T* tile = x + i * stride;
      if (key_columns_ == args_.key_width) {
        multiply_values(slopes + i, rows, tile, stride, keys, sums);
        continue;
      }
      for (int64_t j = 0; j < keys; ++j) widen(tile + j * stride, args_.key_width, widened_ + j * key_columns_);
      multiply_values(slopes + i, rows, widened_, key_columns_, keys, sums);
    }
  }

  template <typename V>
  void multiply_values(const float* slopes, int64_t rows, const V* x, int64_t stride, int64_t count, float* sums) {
    for (int64_t column = 0; column < key_columns_; column += kTileColumns) {
      for (int64_t r = 0; r < rows; r += kTileRows) {
        multiply_tile(slopes + r * columns_, columns_, static_cast<int>(std::min<int64_t>(kTileRows, rows - r)),
                      x + column, stride, count, sums + r * key_columns_ + column, key_columns_, true);
      }
    }
  }

  // sums[start + i] += sum over the run's rows r of scores[r, i] x[r].
  void add_to_branch(const Run& run, const float* scores, const float* x, int64_t stride, float* sums) {
    for (int64_t i = 0; i < run.seen; i += kTileRows) {
      with_count<kTileRows>(std::min<int64_t>(kTileRows, run.seen - i), [&](auto count) {
        for (int64_t column = 0; column < stride; column += kTileColumns) {
          multiply_rows<count>(scores + i, 1, columns_, x + column, stride, run.end - run.first,
                               sums + (run.start + i) * stride + column, stride, true);
        }
      });
    }
  }

  const PrefixAttentionBackwardArgs& args_;
  const int64_t group_;
  const int64_t key_columns_;
  const int64_t value_columns_;
  const int64_t prefix_columns_;
  const int64_t columns_;
  const int64_t rows_;
  std::unique_ptr<float[]> scratch_;
  float* queries_;
  float* query_sums_;
  float* gradients_;
  float* weights_;
  float* slopes_;
  float* cap_slopes_;
  float* key_sums_;
  float* value_sums_;
  float* packed_;
  float* widened_;
  Range of_prefix_[kMaxRows];
  Range of_branch_[kMaxRows];
  std::vector<Run> runs_;
};

template <typename T>
void run(const PrefixAttentionBackwardArgs& args) {
  const int64_t heads = args.batch * args.key_heads;
  if (heads * args.branch_tokens == 0) return;
  const int64_t work = heads * args.tokens * (args.query_heads / args.key_heads) *
                       (args.prefix_tokens + args.branch_tokens) * (2 * args.key_width + args.value_width);
  const int threads = thread_count(args.num_threads, heads, work, kMinWorkPerThread);
  std::atomic<int64_t> next{0};
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
  for (int thread = 0; thread < threads; ++thread) {
    HeadGradients<T> gradients(args);
    for (int64_t head = next++; head < heads; head = next++) {
      gradients.compute(head / args.key_heads, head % args.key_heads);
    }
  }
}

}  // namespace

namespace GGRO_ISA {

void prefix_attention_backward(const PrefixAttentionBackwardArgs& args) {
  check_branches(args);
  with_dtype(args.dtype, [&](auto type) { run<decltype(type)>(args); });
}

}  // namespace GGRO_ISA
}  // namespace ggro::cpu
