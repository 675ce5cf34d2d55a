#pragma once

#include "attention_products.h"

// Attention of a tile of rows to one slot, under one running softmax (arXiv:2205.14135): a split of the prefix, as in
// flash-decoding, or branches. A warp has 16 rows, a block up to 64 of one key head. All warps read the keys and values
// from the same ring of tiles in shared memory, where they arrive two tiles ahead. One row of one decoded token leaves
// warps without rows: they help to load, which is what the others wait for then.

namespace ggro::cuda {

// P: columns of keys and of values in shared memory, zeros from their width on. kWide: there are more of them; keys
// come in pieces, values in tiles of the grid.
template <typename T, int P, bool kWide>
struct AttendKernel {
  using Args = AttentionArgs;
  using Product = Products<T, P>;
  static constexpr int kThreads = 128;
  static constexpr int kBlocksAtOnce = P * sizeof(T) <= 256 && !kWide ? 3 : 1;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kStride = Product::kStride;
  static constexpr int kTile = kTileKeys * kStride;
  static constexpr int kTiles = 3;
  static constexpr int kKeys = 0;
  static constexpr int kValues = 1;
  // Elements of 16 bytes.
  static constexpr int kVector = 16 / sizeof(T);

  static constexpr int query_rows(int rows) {
    return rows < kRows ? (rows + kWarpRows - 1) / kWarpRows * kWarpRows : kRows;
  }

  static int shared_bytes(int rows) {
    return static_cast<int>(sizeof(T)) * (kTiles * kTile + query_rows(rows) * kStride) +
           4 * kWarps * Product::kWeights + 4 * kWarps;
  }

  static GGRO_DEVICE void run(Thread& thread, const Args& args) {
    // Blocks that read the same keys are neighbours. A grid has less than 2^31 blocks.
    int i = static_cast<int>(thread.block());
    i /= args.row_tiles;
    const int column = kWide ? i % args.value_tiles * P : 0;
    if (kWide) i /= args.value_tiles;
    const int slot = args.first_slot + i % (args.slots - args.first_slot);
    i /= args.slots - args.first_slot;
    AttendKernel(thread, args, i, slot, column).attend();
  }

 private:
  // Consecutive keys and values of prefix or branches that some of the rows see.
  struct Segment {
    int start;  // the token that keys are counted from
    int begin;  // the key that the first tile begins with
    int end;
  };

  GGRO_DEVICE AttendKernel(Thread& thread, const Args& args, int i_head, int slot, int column)
      : thread_(thread),
        args_(args),
        op_(args.op),
        batch_(i_head / static_cast<int>(args.op.key_heads)),
        head_(i_head % static_cast<int>(args.op.key_heads)),
        slot_(slot),
        value_column_(column),
        tiles_(thread.shared<T>(kTiles * kTile)),
        weights_(thread.shared<float>(kWarps * Product::kWeights)),
        flags_(thread.shared<int>(kWarps)),
        queries_(thread.shared<T>(query_rows(args.rows) * kStride)) {}

  GGRO_DEVICE int first_row() const { return static_cast<int>(thread_.block()) % args_.row_tiles * kRows; }
  GGRO_DEVICE bool has_rows() const { return first_row() + thread_.warp() * kWarpRows < args_.rows; }

  GGRO_DEVICE int value_columns() const { return least(P, op_.value_width - value_column_); }
  GGRO_DEVICE int first_token() const { return first_row() / args_.group; }
  GGRO_DEVICE int end_token() const { return (least(args_.rows, first_row() + kRows) - 1) / args_.group + 1; }

  GGRO_DEVICE int row_of(int half) const {
    return first_row() + thread_.warp() * kWarpRows + thread_.lane() / 4 + 8 * half;
  }

  // Rows beyond the last do again what that does.
  GGRO_DEVICE int token_of(int half) const { return least(row_of(half), args_.rows - 1) / args_.group; }

  GGRO_DEVICE void attend() {
    for (exact_ = false;; exact_ = true) {
      start();
      bool attended = false;
      Segment segment;
      // Votes and shuffles tell the compiler that a warp goes one way.
      for (int token = first_token(); thread_.ballot(next_segment(token, segment)) != 0; attended = true) {
        segment = {thread_.shuffle(segment.start, 0), thread_.shuffle(segment.begin, 0),
                   thread_.shuffle(segment.end, 0)};
        if (!attended && !kWide) load_queries(0);
        attend_to(segment);
      }
      if (!attended) return;
      if (exact_ || !any_infinite()) break;
    }
    store();
  }

  GGRO_DEVICE void start() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max_[half] = -INFINITY;
      sum_[half] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < Product::kAccumulators; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc_[j][i] = 0.0f;
    }
  }

  // The split, or the next of the long branches that go on with tokens of this block, and what rows see of it.
  GGRO_DEVICE bool next_segment(int& token, Segment& segment) {
    if (slot_ != 0) {
      if (token != first_token()) return false;
      ++token;
      const int length = prefix_length(op_, batch_);
      segment = {0, static_cast<int>(split_start(slot_ - 1)), least(length, split_start(slot_))};
      if (op_.window < op_.prefix_tokens + op_.branch_tokens) {
        const int first = outside_window(op_, length, least_own()) / kTileKeys * kTileKeys;
        if (first > segment.begin) segment.begin = first;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = token_of(half);
        first_[half] = outside_window(op_, length, place_in_branch(op_, batch_, token));
        end_[half] = has_rows() ? segment.end : 0;
      }
      return segment.begin < segment.end;
    }
    const int end_token = this->end_token();
#pragma unroll 1
    while (token < end_token) {
      const int start = branch_start(op_, batch_, token, branch_end(op_, batch_, token));
      int first = token++;
      if (op_.branch_ends == nullptr) {
#pragma unroll 1
        while (token < end_token && branch_start(op_, batch_, token, token) == start) ++token;
        if (first < start + kShortBranch) first = start + kShortBranch;
        if (first >= token) continue;
      } else if (branch_end(op_, batch_, first) < start + kShortBranch) {
        continue;
      }
      // Ends that are given may be in any order: then a segment is what one token sees.
      segment = {start, outside_window(op_, 0, branch_end(op_, batch_, first) - start) / kTileKeys * kTileKeys,
                 branch_end(op_, batch_, token - 1) - start + 1};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = branch_end(op_, batch_, token_of(half)) - start;
        first_[half] = outside_window(op_, 0, own);
        end_[half] = has_rows() && token_of(half) >= first && token_of(half) < token ? own + 1 : 0;
      }
      return true;
    }
    return false;
  }

  // How long a branch the token has that looks back furthest.
  GGRO_DEVICE int least_own() const {
    const int end_token = this->end_token();
    int own = static_cast<int>(op_.branch_tokens);
#pragma unroll 1
    for (int token = first_token() + thread_.lane(); token < end_token; token += 32) {
      own = least(own, place_in_branch(op_, batch_, token));
    }
    for (int mask = 1; mask < 32; mask *= 2) own = least(own, thread_.shuffle_xor(own, mask));
    return own;
  }

  static GGRO_DEVICE int after(int tile) { return tile == (kTiles - 1) * kTile ? 0 : tile + kTile; }

  GGRO_DEVICE void attend_to(const Segment& segment) {
    // Whoever read the tiles before is done.
    thread_.sync();
    if constexpr (!kWide) {
      fetch(segment, segment.begin, kKeys, 0, 0);
      fetch(segment, segment.begin, kValues, value_column_, kTile);
    }
#pragma unroll 1
    for (int key = segment.begin, tile = 0; key < segment.end; key += kTileKeys) {
      const Seen seen = {{first_[0] - key, first_[1] - key}, {end_[0] - key, end_[1] - key}};
      const bool sees = thread_.ballot(seen.any(0) || seen.any(1)) != 0;
      Scores s;
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
      }
      if constexpr (kWide) {
#pragma unroll 1
        for (int column = 0; column < op_.key_width; column += P) {
          fetch(segment, key, kKeys, column, tile);
          load_queries(column);
          arrive<0>();
          if (sees) add_scores(tile, s);
          thread_.sync();
        }
        fetch(segment, key, kValues, value_column_, tile);
        arrive<0>();
      } else {
        arrive<1>();
        fetch(segment, key + kTileKeys, kKeys, 0, after(after(tile)));
        if (sees) add_scores(tile, s);
        tile = after(tile);
      }
      if (sees) weigh(s, seen);
      if constexpr (!kWide) {
        arrive<1>();
        fetch(segment, key + kTileKeys, kValues, value_column_, after(after(tile)));
      }
      add_values(segment, key, tile, s, seen, sees);
      if constexpr (kWide) {
        thread_.sync();
      } else {
        tile = after(tile);
      }
    }
  }

  // All but the last `Pending` of the tiles that were fetched are there, for all threads, and all are done with the
  // rest.
  template <int Pending>
  GGRO_DEVICE void arrive() const {
    thread_.template wait_for_copies<Pending>();
    thread_.sync();
  }

  GGRO_DEVICE void add_scores(int tile, Scores& s) const {
    Product::add_scores(thread_, queries_, thread_.warp() * kWarpRows * kStride, tiles_, tile, s);
  }

  GGRO_DEVICE void add_values(const Segment& segment, int key, int tile, const Scores& s, const Seen& seen, bool sees) {
    if constexpr (Product::kCounts) {
      if (exact_) {
        keep_finite(tile);
        thread_.sync();
      }
    }
    if (sees) Product::add_values(thread_, s, weights_, tiles_, tile, seen, exact_, acc_);
    if constexpr (Product::kCounts) {
      if (exact_) {
        thread_.sync();
        load_codes(segment, key, tile);
        thread_.sync();
        if (sees) Product::add_infinities(thread_, s, tiles_, tile, seen, acc_);
      }
    }
  }

  // Begins to copy a tile of keys or values; zeros stand for columns and tokens that do not exist.
  GGRO_DEVICE void fetch(const Segment& segment, int key, int of, int first_column, int tile) const {
    const int keys = least(kTileKeys, segment.end - key);
    if (keys <= 0) return thread_.commit_copies();
    const HeadsView& view = args_.views[slot_ == 0 ? 0 : 1][of];
    const int64_t stride = view.token_stride;
    const T* source = tokens_of<T>(view, batch_, head_) + (segment.start + key) * stride + first_column;
    const int columns = least(P, (of == kKeys ? op_.key_width : op_.value_width) - first_column);
    const bool vectors =
        reinterpret_cast<uintptr_t>(source) % 16 == 0 && stride % kVector == 0 && columns % kVector == 0;
    if (vectors) {
      constexpr int kRowVectors = P / kVector, kRowsAtOnce = kThreads / kRowVectors;
      const int column = thread_.index() % kRowVectors * kVector, first = thread_.index() / kRowVectors;
      source += first * stride + column;
#pragma unroll 8
      for (int i = 0; i < kTileKeys; i += kRowsAtOnce) {
        tiles_.copy_async(tile + (first + i) * kStride + column, source, first + i < keys && column < columns);
        source += kRowsAtOnce * stride;
      }
    } else {
      for_each(kTileKeys, P, [&](int row, int column) {
        const bool exists = row < keys && column < columns;
        tiles_.store(tile + row * kStride + column, exists ? source[row * stride + column] : T{});
      });
    }
    thread_.commit_copies();
  }

  // The warps take rows, the lanes columns.
  template <typename Body>
  GGRO_DEVICE void for_each(int rows, int columns, Body body) const {
#pragma unroll 1
    for (int row = thread_.warp(); row < rows; row += kWarps) {
#pragma unroll 1
      for (int column = thread_.lane(); column < columns; column += 32) body(row, column);
    }
  }

  GGRO_DEVICE void load_queries(int first_column) const {
    const int columns = least(P, op_.key_width - first_column);
    for_each(query_rows(args_.rows), P / kVector, [&](int place, int i) {
      const int row = least(first_row() + place, args_.rows - 1), column = i * kVector;
      const T* source = tokens_of<T>(op_.query, batch_, head_ * args_.group + row % args_.group) +
                        row / args_.group * op_.query.token_stride + first_column + column;
      Vector<T, kVector> vector;
      if (reinterpret_cast<uintptr_t>(source) % 16 == 0 && column + kVector <= columns) {
        vector = load_vector<T, kVector>(source);
      } else {
#pragma unroll
        for (int c = 0; c < kVector; ++c) vector.data[c] = column + c < columns ? source[c] : T{};
      }
      queries_.store_vector(place * kStride + column, vector);
    });
  }

  // The softmax of the scores, to whose new maximum goes what was summed so far.
  GGRO_DEVICE void weigh(Scores& s, const Seen& seen) {
    float rescale[2];
    scores_to_weights(thread_, args_.factor, args_.cap, seen, s, max_, sum_, rescale);
    if (thread_.ballot(rescale[0] != 1.0f || rescale[1] != 1.0f) == 0) return;
#pragma unroll
    for (int j = 0; j < Product::kAccumulators; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc_[j][i] *= rescale[Product::half_of(j, i)];
    }
  }

  GGRO_DEVICE void keep_finite(int tile) const {
    for_each(kTileKeys, P, [&](int row, int column) {
      const int place = tile + row * kStride + column;
      if (!(fabsf(to_float(tiles_.load(place))) < INFINITY)) tiles_.store(place, T{});
    });
  }

  GGRO_DEVICE void load_codes(const Segment& segment, int key, int tile) const {
    const HeadsView& view = args_.views[slot_ == 0 ? 0 : 1][kValues];
    const T* source = tokens_of<T>(view, batch_, head_) + (segment.start + key) * view.token_stride + value_column_;
    for_each(kTileKeys, P, [&](int row, int column) {
      const bool exists = key + row < segment.end && column < value_columns();
      tiles_.store(tile + row * kStride + column,
                   exists ? Product::code(source[row * view.token_stride + column]) : T{});
    });
  }

  // Whether some row of the block has a value that is not finite.
  GGRO_DEVICE bool any_infinite() const {
    bool finite = true;
#pragma unroll
    for (int j = 0; j < Product::kAccumulators; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) finite = finite && fabsf(acc_[j][i]) < INFINITY;
    }
    const unsigned infinite = thread_.ballot(!finite);
    if (thread_.lane() == 0) flags_.store(thread_.warp(), infinite != 0);
    thread_.sync();
    bool any = false;
    for (int warp = 0; warp < kWarps; ++warp) any = any || flags_.load(warp) != 0;
    return thread_.ballot(any) != 0;
  }

  GGRO_DEVICE void store() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum_[half] += thread_.shuffle_xor(sum_[half], 1);
      sum_[half] += thread_.shuffle_xor(sum_[half], 2);
      if (row_of(half) >= args_.rows) continue;
      const int64_t place = ((batch_ * op_.key_heads + head_) * args_.slots + slot_) * args_.rows + row_of(half);
      if (value_column_ == 0 && thread_.lane() % 4 == 0) {
        args_.maxima[place] = max_[half];
        args_.sums[place] = sum_[half];
      }
      float* partial = args_.partials + place * args_.partial_width + value_column_;
      constexpr int kConsecutive = Product::kConsecutive;
#pragma unroll
      for (int j = 0; j < Product::kAccumulators; ++j) {
#pragma unroll
        for (int i = 0; i < 4; i += kConsecutive) {
          const int column = Product::column_of(thread_, j, i);
          if (Product::half_of(j, i) != half || column >= value_columns()) continue;
          Vector<float, kConsecutive> vector;
#pragma unroll
          for (int c = 0; c < kConsecutive; ++c) vector.data[c] = acc_[j][i + c];
          store_vector(partial + column, vector);
        }
      }
    }
  }

  Thread& thread_;
  const Args& args_;
  const PrefixAttentionArgs& op_;
  const int batch_;
  const int head_;
  const int slot_;
  const int value_column_;
  const Shared<T> tiles_;
  const Shared<float> weights_;
  const Shared<int> flags_;
  const Shared<T> queries_;
  bool exact_;
  // Of the two rows of the lane: the keys of the segment that they see.
  int first_[2];
  int end_[2];
  float max_[2];
  float sum_[2];  // of the keys that this lane scores
  typename Product::Accumulators acc_;
};

}  // namespace ggro::cuda
