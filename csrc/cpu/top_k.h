#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "simd.h"

// Exact selection of the k largest values of a row: value descending, then index ascending; -0.0 equals +0.0, NaN is
// the largest value. In an unnamed namespace for the reason given in simd.h.
namespace ggro::cpu {
namespace {

// Value in the high half, complemented index in the low half: one descending comparison gives the order.
using Candidate = uint64_t;

// Own type, so that the standard algorithms instantiated with it are local to this translation unit.
struct Better {
  bool operator()(Candidate a, Candidate b) const { return a > b; }
};

constexpr uint32_t kNaNKey = 0xffffffffu;

inline Candidate make_candidate(float value, int64_t index) {
  // Adding zero turns -0.0 into +0.0.
  value += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t key = value != value ? kNaNKey : bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return (static_cast<uint64_t>(key) << 32) | (0xffffffffu - static_cast<uint32_t>(index));
}

inline int64_t candidate_index(Candidate candidate) {
  return static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(candidate));
}

// NaN for the key of a NaN; the sign of a zero is lost.
inline float key_to_value(uint32_t key) {
  const uint32_t bits = key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu);
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float candidate_value(Candidate candidate) { return key_to_value(static_cast<uint32_t>(candidate >> 32)); }

// Signed integer in the order of the values; -0.0 is just below +0.0. x must not be NaN.
inline int32_t ordered_key(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float ordered_key_to_value(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// The largest key found by bisection that at least k of `keys` reach and not many more; count must be at least k.
inline int32_t near_kth_largest(const int32_t* keys, int64_t count, int64_t k) {
  int64_t low = std::numeric_limits<int32_t>::max();
  int64_t high = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < count; ++i) {
    low = std::min<int64_t>(low, keys[i]);
    high = std::max<int64_t>(high, keys[i]);
  }
  // At least k keys reach low, fewer than k reach high.
  ++high;
  int64_t reached = count;
  while (high - low > 1 && reached > k + k / 4) {
    const int32_t middle = static_cast<int32_t>((low + high) >> 1);
    int32_t reaching = 0;
    for (int64_t i = 0; i < count; ++i) reaching += keys[i] >= middle ? 1 : 0;
    if (reaching >= k) {
      low = middle;
      reached = reaching;
    } else {
      high = middle;
    }
  }
  return static_cast<int32_t>(low);
}

// The k best of the columns offered, in index order: a buffer that takes whatever exceeds a threshold. When it is full
// it is cut to the k best, and the k-th value becomes the threshold: a later column that only equals it has a higher
// index and loses.
class TopK {
 public:
  static int64_t capacity(int64_t k) { return 2 * k + 64; }

  TopK(Candidate* buffer, int64_t k) : buffer_(buffer), k_(k), capacity_(capacity(k)) {}

  // Begin with a threshold just below a value that at least k of the columns to come reach.
  // keys: ordered keys of some of these columns; too few of them leave everything accepted.
  void start_from(const int32_t* keys, int64_t count) {
    if (count < k_) return;
    const float reached = ordered_key_to_value(near_kth_largest(keys, count, k_));
    if (reached == -kInfinity) return;
    // Below zero and denormals in one step: they may compare as equal to zero.
    threshold_ = std::fabs(reached) <= FLT_MIN ? -2 * FLT_MIN : ordered_key_to_value(ordered_key(reached) - 1);
    state_ = State::kThreshold;
  }

  // Whether columns with this maximum, which ignores NaN, may hold a candidate.
  bool may_accept(float max, bool has_nan) const {
    return state_ == State::kAcceptAll || (state_ == State::kThreshold && (max > threshold_ || has_nan));
  }

  template <typename T>
  void offer(const T* x, int64_t columns, int64_t first_index) {
    int64_t i = 0;
    for (; i + kLanes <= columns && state_ != State::kFull; i += kLanes) {
      // Comparing with a NaN threshold accepts everything.
      uint32_t mask = not_less_equal(load(x + i), broadcast(threshold_));
      if (mask == 0) continue;
      for (; mask != 0; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        buffer_[count_++] = make_candidate(to_float(x[i + lane]), first_index + i + lane);
      }
      if (count_ > capacity_ - kLanes) prune();
    }
    for (; i < columns && state_ != State::kFull; ++i) {
      const float value = to_float(x[i]);
      if (!(value <= threshold_)) add(make_candidate(value, first_index + i));
    }
  }

  void add(Candidate candidate) {
    buffer_[count_++] = candidate;
    if (count_ > capacity_ - kLanes) prune();
  }

  // Leaves at most k candidates, in no particular order.
  void prune() {
    if (count_ <= k_) return;
    std::nth_element(buffer_, buffer_ + k_ - 1, buffer_ + count_, Better());
    count_ = k_;
    const uint32_t key = static_cast<uint32_t>(buffer_[k_ - 1] >> 32);
    state_ = key == kNaNKey ? State::kFull : State::kThreshold;
    threshold_ = key_to_value(key);
  }

  void sort() {
    prune();
    std::sort(buffer_, buffer_ + count_, Better());
  }

  // Only once sorted.
  void write(float* values, int64_t* indices) const {
    for (int64_t i = 0; i < count_; ++i) {
      values[i] = candidate_value(buffer_[i]);
      indices[i] = candidate_index(buffer_[i]);
    }
  }

  const Candidate* candidates() const { return buffer_; }
  int64_t count() const { return count_; }

 private:
  // kFull: k NaNs, the largest value there is, have been found.
  enum class State { kAcceptAll, kThreshold, kFull };

  Candidate* buffer_;
  int64_t k_;
  int64_t capacity_;
  int64_t count_ = 0;
  float threshold_ = kNaN;
  State state_ = State::kAcceptAll;
};

// The k best of several rows, each found by several threads in columns of their own.
class RowTopKs {
 public:
  RowTopKs(int64_t threads, int64_t rows, int64_t k)
      : threads_(threads), rows_(rows), buffer_(new Candidate[threads * rows * TopK::capacity(k)]) {
    parts_.reserve(static_cast<size_t>(threads * rows));
    for (int64_t i = 0; i < threads * rows; ++i) parts_.emplace_back(buffer_.get() + i * TopK::capacity(k), k);
  }

  TopK& part(int64_t thread, int64_t row) { return parts_[static_cast<size_t>(thread * rows_ + row)]; }

  // The k best of all threads, sorted.
  const TopK& merge(int64_t row) {
    TopK& merged = part(0, row);
    for (int64_t thread = 1; thread < threads_; ++thread) {
      TopK& other = part(thread, row);
      other.prune();
      for (int64_t i = 0; i < other.count(); ++i) merged.add(other.candidates()[i]);
    }
    merged.sort();
    return merged;
  }

 private:
  int64_t threads_;
  int64_t rows_;
  std::unique_ptr<Candidate[]> buffer_;
  std::vector<TopK> parts_;
};

}  // namespace
}  // namespace ggro::cpu
