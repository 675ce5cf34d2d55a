#include "misuse.h"

#include <stdexcept>
#include <string>

#include "portable.h"

// Kernels with one mistake each, or none: what the emulation must find, and what it must let pass.

namespace ggro::cuda::emulation {
namespace {

struct Case {
  int64_t address;
};

template <void (*Body)(Thread&, const Case&), int Threads = 64>
struct Kernel {
  using Args = Case;
  static constexpr int kThreads = Threads;
  static void run(Thread& thread, const Args& args) { Body(thread, args); }
};

void neighbours(Thread& thread, const Case&) {
  const Shared<float> values = thread.shared<float>(64);
  values.store(thread.index(), 1.0f);
  thread.sync();
  const float theirs = values.load((thread.index() + 1) % 64);
  thread.sync();
  values.store(thread.index(), theirs);
}

void neighbours_in_a_warp(Thread& thread, const Case&) {
  const Shared<float> values = thread.shared<float>(64);
  values.store(thread.index(), 1.0f);
  thread.sync_warp();
  values.load(thread.warp() * 32 + (thread.lane() + 1) % 32);
}

void counts(Thread& thread, const Case&) {
  const Shared<int> count = thread.shared<int>(1);
  if (thread.index() == 0) count.store(0, 0);
  thread.sync();
  count.atomic_add(0, 1);
  thread.sync();
  if (count.load(0) != 64) fail("counted " + std::to_string(count.load(0)));
}

void copies(Thread& thread, const Case& args) {
  const Shared<float> values = thread.shared<float>(256);
  values.copy_async(thread.index() * 4, reinterpret_cast<const float*>(args.address));
  thread.commit_copies();
  thread.wait_for_copies<0>();
  thread.sync();
  values.load(thread.index());
}

void out_of_bounds(Thread& thread, const Case&) { thread.shared<float>(63).store(thread.index(), 1.0f); }

void unwritten(Thread& thread, const Case&) { thread.shared<float>(64).load(thread.index()); }

void read_without_barrier(Thread& thread, const Case&) {
  const Shared<float> values = thread.shared<float>(64);
  values.store(thread.index(), 1.0f);
  thread.sync();
  values.store(thread.index(), 2.0f);
  values.load((thread.index() + 32) % 64);
}

void write_without_barrier(Thread& thread, const Case&) {
  const Shared<float> values = thread.shared<float>(64);
  values.store(thread.index(), 1.0f);
  thread.sync();
  values.load((thread.index() + 32) % 64);
  values.store(thread.index(), 2.0f);
}

void two_writers(Thread& thread, const Case&) { thread.shared<float>(1).store(0, 1.0f); }

void read_without_barrier_in_a_warp(Thread& thread, const Case&) {
  const Shared<float> values = thread.shared<float>(64);
  values.store(thread.index(), 1.0f);
  // An exchange orders nothing but what it exchanges.
  thread.shuffle(1, 0);
  values.load(thread.warp() * 32 + (thread.lane() + 1) % 32);
}

void barrier_of_a_warp_for_a_block(Thread& thread, const Case&) {
  const Shared<float> values = thread.shared<float>(64);
  values.store(thread.index(), 1.0f);
  thread.sync_warp();
  values.load((thread.index() + 32) % 64);
}

void count_read_early(Thread& thread, const Case&) {
  const Shared<int> count = thread.shared<int>(1);
  if (thread.index() == 0) count.store(0, 0);
  thread.sync();
  count.atomic_add(0, 1);
  count.load(0);
}

void copy_not_awaited(Thread& thread, const Case& args) {
  const Shared<float> values = thread.shared<float>(256);
  values.copy_async(thread.index() * 4, reinterpret_cast<const float*>(args.address));
  thread.commit_copies();
  thread.sync();
  values.load(thread.index() * 4);
}

void different_exchanges(Thread& thread, const Case&) {
  if (thread.lane() < 16) {
    thread.ballot(true);
  } else {
    thread.shuffle(1, 0);
  }
}

void half_an_exchange(Thread& thread, const Case&) {
  if (thread.lane() < 16) thread.ballot(true);
}

void half_a_barrier(Thread& thread, const Case&) {
  if (thread.warp() == 0) thread.sync();
}

void misaligned(Thread&, const Case& args) { load_vector<float, 4>(reinterpret_cast<const float*>(args.address) + 1); }

void different_arrays(Thread& thread, const Case&) { thread.shared<float>(thread.warp() == 0 ? 8 : 16); }

void nothing(Thread&, const Case&) {}

template <void (*Body)(Thread&, const Case&)>
void start(const char* name, const Case& args, int64_t blocks = 1, bool overlaps = false) {
  launch<Kernel<Body>>(name, blocks, 1024, args, {0, nullptr}, overlaps);
}

}  // namespace

void misuse(const std::string& name) {
  alignas(16) static const float zeros[4] = {};
  const Case args = {static_cast<int64_t>(reinterpret_cast<uintptr_t>(zeros))};
#define GGRO_CASE(body) \
  if (name == #body) return start<body>(#body, args);
  GGRO_CASE(neighbours)
  GGRO_CASE(neighbours_in_a_warp)
  GGRO_CASE(counts)
  GGRO_CASE(copies)
  GGRO_CASE(out_of_bounds)
  GGRO_CASE(unwritten)
  GGRO_CASE(read_without_barrier)
  GGRO_CASE(write_without_barrier)
  GGRO_CASE(two_writers)
  GGRO_CASE(read_without_barrier_in_a_warp)
  GGRO_CASE(barrier_of_a_warp_for_a_block)
  GGRO_CASE(count_read_early)
  GGRO_CASE(copy_not_awaited)
  GGRO_CASE(different_exchanges)
  GGRO_CASE(half_an_exchange)
  GGRO_CASE(half_a_barrier)
  GGRO_CASE(misaligned)
  GGRO_CASE(different_arrays)
#undef GGRO_CASE
  if (name == "too_much_shared_memory") {
    return launch<Kernel<nothing>>("too_much_shared_memory", 1, 200 * 1024, args, {0, nullptr});
  }
  if (name == "empty_grid") return start<nothing>("empty_grid", args, 0);
  if (name == "never_waited") return start<nothing>("never_waited", args, 1, true);
  throw std::invalid_argument("there is no case " + name);
}

}  // namespace ggro::cuda::emulation
