#pragma once

#include "portable.h"

// The k largest of many, by value descending, then index ascending, by all threads of a block.

namespace ggro::cuda {

// Integers in the order of the numbers: -0.0 equals +0.0, NaN is the largest, and 0 is below -inf.
GGRO_DEVICE uint32_t order_key(float x) {
  if (x != x) return 0xffffffffu;
  // -0.0 becomes +0.0.
  const uint32_t bits = bits_of(x + 0.0f);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

// What the halves of a key of T leave at zero, or at one for a negative number, which is as good as nothing.
template <typename T>
constexpr int kUnusedKeyBits = sizeof(T) == 2 ? 16 : 0;

// Keys of T in as few bits as tell its values apart. fp16 has more mantissa and fewer exponents than 16 bits of fp32.
template <>
constexpr int kUnusedKeyBits<Float16> = 13;

template <typename T>
GGRO_DEVICE uint32_t order_key(T x) {
  return order_key(to_float(x)) >> kUnusedKeyBits<T>;
}

// Sums over a block of up to three counts of each thread, the same for all threads.
template <int kThreads>
class BlockCounts {
 public:
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSharedBytes = shared_bytes_of<uint32_t>(2 * 3 * kWarps);

  GGRO_DEVICE explicit BlockCounts(Thread& thread) : sums_(thread.shared<uint32_t>(2 * 3 * kWarps)) {}

  GGRO_DEVICE void add(const Thread& thread, uint32_t (&counts)[3]) {
    // One set is written while a late thread may still read the other.
    set_ ^= 1;
    const int first = set_ * 3 * kWarps;
    for (int i = 0; i < 3; ++i) {
      const uint32_t sum = thread.warp_sum(counts[i]);
      if (thread.lane() == 0) sums_.store(first + i * kWarps + thread.warp(), sum);
    }
    thread.sync();
    for (int i = 0; i < 3; ++i) {
      counts[i] = 0;
      for (int warp = 0; warp < kWarps; ++warp) counts[i] += sums_.load(first + i * kWarps + warp);
    }
  }

  // How many threads before this one counted, and the total.
  GGRO_DEVICE uint32_t before(const Thread& thread, uint32_t count, uint32_t* total = nullptr) {
    uint32_t inclusive = count;
    for (int delta = 1; delta < 32; delta *= 2) {
      const uint32_t other = thread.shuffle_up(inclusive, delta);
      if (thread.lane() >= delta) inclusive += other;
    }
    set_ ^= 1;
    const int first = set_ * 3 * kWarps;
    if (thread.lane() == 31) sums_.store(first + thread.warp(), inclusive);
    thread.sync();
    uint32_t earlier = 0, all = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      const uint32_t sum = sums_.load(first + warp);
      if (warp < thread.warp()) earlier += sum;
      all += sum;
    }
    if (total != nullptr) *total = all;
    return earlier + inclusive - count;
  }

 private:
  Shared<uint32_t> sums_;
  int set_ = 0;
};

// Calls take(place, i) for the k largest of the keys key(0) .. key(count - 1), of equal ones the first; places 0 .. k-1
// ascend with i. `bits`: how many of a key's bits are used; 1 <= k <= count. take's writes need a barrier to be read.
template <int kThreads, typename Key, typename Take>
GGRO_DEVICE void take_largest(Thread& thread, BlockCounts<kThreads>& block, int count, int k, int bits, Key key,
                              Take take) {
  // A thread has neighbours, so that the order of the threads is that of the keys; an odd number, so that the threads
  // of a warp find theirs in different banks.
  const int each = ((count + kThreads - 1) / kThreads) | 1;
  const int first = thread.index() * each;
  const int last = first + each < count ? first + each : count;

  // The k-th largest key, two bits at a time: the largest number that at least k keys reach.
  uint32_t least = 0;
  for (int shift = (bits - 1) / 2 * 2; shift >= 0; shift -= 2) {
    uint32_t counts[3] = {};
    for (int i = first; i < last; ++i) {
      const uint32_t x = key(i);
      for (uint32_t step = 1; step <= 3; ++step) counts[step - 1] += x >= (least | step << shift);
    }
    block.add(thread, counts);
    const uint32_t steps = (counts[0] >= static_cast<uint32_t>(k)) + (counts[1] >= static_cast<uint32_t>(k)) +
                           (counts[2] >= static_cast<uint32_t>(k));
    least |= steps << shift;
  }

  uint32_t counts[3] = {};
  for (int i = first; i < last; ++i) {
    const uint32_t x = key(i);
    counts[0] += x > least;
    counts[1] += x == least;
  }
  const uint32_t larger_before = block.before(thread, counts[0], &counts[2]);
  uint32_t equal_before = block.before(thread, counts[1]);
  const uint32_t equals = static_cast<uint32_t>(k) - counts[2];
  uint32_t place = larger_before + (equal_before < equals ? equal_before : equals);
  for (int i = first; i < last; ++i) {
    const uint32_t x = key(i);
    if (x > least || (x == least && equal_before++ < equals)) take(static_cast<int>(place++), i);
  }
}

}  // namespace ggro::cuda
