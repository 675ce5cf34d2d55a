#pragma once

// The layer of csrc/cuda/portable.h on a CPU, for tests: every thread of a block is a fiber, blocks run one after
// another.
//
// Reported as errors, with the kernel, the block and the thread: shared memory out of bounds, read before it was
// written, or touched by two threads without a barrier between them; a barrier or an exchange that not all threads
// reach; vector loads at addresses they cannot have; launches that a GPU would refuse.
//
// GGRO_EMULATION_SEED=0, the default, runs threads and blocks in order, another number in an order drawn from it.

#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"
#include "ggro/types.h"
#include "portable.h"

#define GGRO_DEVICE inline

namespace ggro::cuda {

// Few, so that small tests take several slabs.
constexpr int64_t kFloatsAtOnce = 1 << 14;

template <typename T>
class Shared {
  static_assert(sizeof(T) % emulation::kGranule == 0, "shared memory is watched in units of two bytes");

 public:
  Shared(emulation::Block& block, int offset, int count) : block_(block), offset_(offset), count_(count) {}

  T load(int i) const { return load_vector<1>(i).data[0]; }
  void store(int i, T value) const { store_vector<1>(i, {{value}}); }

  void atomic_add(int i, T value) const {
    const int offset = place(i, 1);
    block_.note_atomic(offset, sizeof(T));
    T sum;
    std::memcpy(&sum, block_.shared(offset), sizeof(T));
    sum += value;
    std::memcpy(block_.shared(offset), &sum, sizeof(T));
  }

  template <int N>
  Vector<T, N> load_vector(int i) const {
    const int offset = place(i, N);
    block_.note_read(offset, N * sizeof(T));
    Vector<T, N> value;
    std::memcpy(&value, block_.shared(offset), sizeof(value));
    return value;
  }
  template <int N>
  void store_vector(int i, const Vector<T, N>& value) const {
    const int offset = place(i, N);
    block_.note_write(offset, N * sizeof(T));
    std::memcpy(block_.shared(offset), &value, sizeof(value));
  }

  void copy_async(int i, const T* source, bool exists = true) const {
    constexpr int kElements = 16 / sizeof(T);
    emulation::check_alignment(source, 16);
    block_.begin_copy(place(i, kElements), exists ? source : nullptr);
  }

 private:
  // The offset of n elements from i on.
  int place(int i, int n) const {
    if (i < 0 || i + n > count_) {
      emulation::fail("shared memory: elements " + std::to_string(i) + " .. " + std::to_string(i + n - 1) + " of " +
                      std::to_string(count_));
    }
    if (i % n != 0) emulation::fail("shared memory: a vector of " + std::to_string(n) + " at " + std::to_string(i));
    return offset_ + i * static_cast<int>(sizeof(T));
  }

  emulation::Block& block_;
  int offset_;
  int count_;
};

class Thread {
 public:
  explicit Thread(emulation::Block& block) : block_(block) {}

  int64_t block() const { return block_.index(); }
  int index() const { return block_.current(); }
  int warp() const { return index() / 32; }
  int lane() const { return index() % 32; }

  void sync() const { block_.sync(); }
  void sync_warp() const { block_.sync_warp(); }

  template <typename T>
  T shuffle(T value, int source) const {
    return exchange("shuffle", value)[source % 32].value;
  }
  template <typename T>
  T shuffle_xor(T value, int mask) const {
    return exchange("shuffle_xor", value)[lane() ^ mask].value;
  }
  template <typename T>
  T shuffle_up(T value, int delta) const {
    return exchange("shuffle_up", value)[lane() < delta ? lane() : lane() - delta].value;
  }
  unsigned ballot(bool predicate) const {
    const auto* lanes = exchange("ballot", predicate);
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(lanes[i].value) << i;
    return bits;
  }
  unsigned warp_sum(unsigned value) const {
    const auto* lanes = exchange("warp_sum", value);
    unsigned sum = 0;
    for (int i = 0; i < 32; ++i) sum += lanes[i].value;
    return sum;
  }

  template <bool kTransposed, typename T>
  void load_matrices(const Shared<T>& shared, int row, uint32_t (&r)[4]) const {
    static_assert(sizeof(T) == 2);
    const auto* rows = exchange("load_matrices", shared.template load_vector<8>(row));
    for (int j = 0; j < 4; ++j) {
      r[j] = 0;
      for (int i = 0; i < 2; ++i) {
        const int along = lane() % 4 * 2 + i, across = lane() / 4;
        const T element = kTransposed ? rows[8 * j + along].value.data[across] : rows[8 * j + across].value.data[along];
        r[j] |= static_cast<uint32_t>(element.bits) << (16 * i);
      }
    }
  }

  template <typename T>
  void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const;

  void commit_copies() const { block_.commit_copies(); }
  template <int Pending>
  void wait_for_copies() const {
    block_.wait_for_copies(Pending);
  }

  template <typename T>
  Shared<T> shared(int count) {
    const int offset = offset_;
    offset_ += shared_bytes_of<T>(count);
    block_.allocate(offset, offset_ - offset);
    return Shared<T>(block_, offset, count);
  }

  void wait_for_previous_kernel() const { block_.wait_for_previous_kernel(); }

 private:
  template <typename T>
  struct alignas(emulation::kSlotBytes) Slot {
    T value;
  };

  // What all 32 lanes brought to the same exchange.
  template <typename T>
  const Slot<T>* exchange(const char* operation, const T& value) const {
    static_assert(sizeof(Slot<T>) == emulation::kSlotBytes && std::is_trivially_copyable_v<T>);
    return reinterpret_cast<const Slot<T>*>(block_.exchange(operation, &value, sizeof(T)));
  }

  emulation::Block& block_;
  int offset_ = 0;
};

template <typename T, int N>
Vector<T, N> load_vector(const T* source) {
  emulation::check_alignment(source, sizeof(Vector<T, N>));
  Vector<T, N> value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

template <typename T, int N>
void store_vector(T* target, const Vector<T, N>& value) {
  emulation::check_alignment(target, sizeof(Vector<T, N>));
  std::memcpy(target, &value, sizeof(value));
}

inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }

inline float product(float a, float b) { return a * b; }

inline float power_of_two(float x) {
  const float power = exp2f(x);
  return power < 0x1p-126f ? 0.0f : power;
}

inline uint32_t shifted_word(uint32_t low, uint32_t high, int bytes) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> (8 * bytes));
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof(half));
  return static_cast<float>(half);
}

template <typename T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    if (std::isnan(x)) return {0x7fff};
    const uint32_t bits = bits_of(x);
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else {
    const auto half = static_cast<_Float16>(x);
    Float16 rounded;
    std::memcpy(&rounded.bits, &half, sizeof(half));
    return rounded;
  }
}

template <typename T>
void Thread::multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
  struct Fragments {
    uint32_t a[4];
    uint32_t b[2];
  };
  const auto* lanes = exchange("multiply_add_16x8x16", Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const auto half = [](uint32_t word, int which) { return to_float(T{static_cast<uint16_t>(word >> (16 * which))}); };
  // The layout of fragments in the PTX manual, "Matrix fragments for mma.m16n8k16 with floating point type".
  const int group = lane() / 4, place = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, column = place * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t a_word = lanes[row % 8 * 4 + k % 8 / 2].value.a[row / 8 + k / 8 * 2];
      const uint32_t b_word = lanes[column * 4 + k % 8 / 2].value.b[k / 8];
      sum += static_cast<double>(half(a_word, k % 2)) * half(b_word, k % 2);
    }
    c[i] = static_cast<float>(sum);
  }
}

template <typename Kernel>
std::string why_not(int) {
  return "";
}

template <typename Kernel>
void launch(const char* name, int64_t blocks, int shared_bytes, const typename Kernel::Args& args, const Stream&,
            bool overlaps = false) {
  static_assert(Kernel::kThreads % 32 == 0 && Kernel::kThreads <= 1024);
  static_assert(std::is_trivially_copyable_v<typename Kernel::Args> && sizeof(typename Kernel::Args) <= 4096);
  emulation::run({name, blocks, Kernel::kThreads, shared_bytes, overlaps}, [&args](emulation::Block& block) {
    Thread thread(block);
    Kernel::run(thread, args);
  });
}

}  // namespace ggro::cuda
