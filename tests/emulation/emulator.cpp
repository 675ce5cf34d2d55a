#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
// AddressSanitizer must know on which stack it is.
#define __sanitizer_start_switch_fiber(...) (void)0
#define __sanitizer_finish_switch_fiber(...) (void)0
#endif

namespace ggro::cuda::emulation {

namespace {

constexpr size_t kStackBytes = 256 * 1024;
// What one block may have on sm_80, the smaller of the architectures that are built.
constexpr int kMostSharedBytes = 163 * 1024;

Block* running = nullptr;

// Stacks of fibers that are no more.
std::vector<void*> spare_stacks;

void* take_stack() {
  if (spare_stacks.empty()) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    return stack;
  }
  void* stack = spare_stacks.back();
  spare_stacks.pop_back();
  return stack;
}

uint64_t next_random(uint64_t& state) {
  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545f4914f6cdd1dULL;
}

uint64_t seed_of_schedule() {
  const char* seed = std::getenv("GGRO_EMULATION_SEED");
  return seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10);
}

}  // namespace

struct Block::Fiber {
  struct Copy {
    int offset;
    const void* source;  // null: zeros
  };

  Fiber() : stack(take_stack()) {}
  ~Fiber() { spare_stacks.push_back(stack); }

  void* stack;
  bool started = false;
  bool waited = false;
  size_t arrays = 0;
  jmp_buf place;
  // The last group is the one that is not yet committed.
  std::deque<std::vector<Copy>> copies;
};

void fail(const std::string& what) { throw std::logic_error(running->where() + ": " + what); }

void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail("a load of " + std::to_string(bytes) + " bytes at an address that is no multiple of them");
  }
}

Block::Block(const Launch& launch, const std::function<void(Block&)>& kernel, uint64_t seed)
    : launch_(launch),
      kernel_(kernel),
      random_(seed),
      warps_(launch.threads / 32),
      shared_(launch.shared_bytes),
      granules_(launch.shared_bytes / kGranule) {
  for (int i = 0; i < launch.threads; ++i) fibers_.push_back(std::make_unique<Fiber>());
}

Block::~Block() = default;

std::string Block::where() const {
  return std::string(launch_.name) + ", block " + std::to_string(index_) + ", thread " + std::to_string(current_);
}

void Block::run(int64_t index) {
  index_ = index;
  epoch_ = finished_ = arrived_ = 0;
  ends_of_arrays_.clear();
  std::fill(shared_.begin(), shared_.end(), static_cast<unsigned char>(0xff));
  std::fill(granules_.begin(), granules_.end(), Granule{});
  for (Warp& warp : warps_) warp.epoch = warp.arrived = 0;
  runnable_.resize(launch_.threads);
  std::iota(runnable_.rbegin(), runnable_.rend(), 0);
  for (auto& fiber : fibers_) {
    fiber->started = fiber->waited = false;
    fiber->arrays = 0;
    fiber->copies.assign(1, {});
  }
  running = this;
  while (finished_ < launch_.threads && !error_) {
    if (runnable_.empty()) {
      error_ = std::make_exception_ptr(std::logic_error(stuck()));
      break;
    }
    if (random_ != 0) std::swap(runnable_.back(), runnable_[next_random(random_) % runnable_.size()]);
    const int thread = runnable_.back();
    runnable_.pop_back();
    resume(thread);
  }
  running = nullptr;
  if (error_) std::rethrow_exception(error_);
}

void Block::enter(unsigned low, unsigned high) {
  reinterpret_cast<Block*>(static_cast<uintptr_t>(high) << 32 | low)->work();
}

void Block::work() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_bytes_);
  try {
    kernel_(*this);
    if (launch_.overlaps && !fibers_[current_]->waited) fail("it never waited for the previous kernel");
  } catch (...) {
    error_ = std::current_exception();
  }
  ++finished_;
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack_, scheduler_stack_bytes_);
  _longjmp(scheduler_, 1);
}

void Block::resume(int thread) {
  current_ = thread;
  Fiber& fiber = *fibers_[thread];
  [[maybe_unused]] void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
  if (_setjmp(scheduler_) == 0) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    // Only begins the fiber: swapcontext would be a system call at every switch.
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(this);
    makecontext(&context, reinterpret_cast<void (*)()>(&Block::enter), 2, static_cast<unsigned>(address),
                static_cast<unsigned>(address >> 32));
    setcontext(&context);
  }
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void Block::yield() {
  Fiber& fiber = *fibers_[current_];
  [[maybe_unused]] void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack_, scheduler_stack_bytes_);
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler_, 1);
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
}

void Block::sync() {
  if (++arrived_ < launch_.threads) {
    yield();
    return;
  }
  arrived_ = 0;
  ++epoch_;
  for (int thread = launch_.threads - 1; thread >= 0; --thread) {
    if (thread != current_) runnable_.push_back(thread);
  }
}

void Block::arrive(const char* operation) {
  const int self = current_;
  Warp& warp = warps_[self / 32];
  if (warp.arrived == 0) {
    warp.operation = operation;
  } else if (warp.operation != operation) {
    fail(std::string(operation) + " while other lanes of the warp are at " + warp.operation);
  }
  if (++warp.arrived < 32) {
    yield();
    return;
  }
  warp.arrived = 0;
  warp.parity ^= 1;
  for (int thread = self / 32 * 32 + 31; thread >= self / 32 * 32; --thread) {
    if (thread != self) runnable_.push_back(thread);
  }
}

void Block::sync_warp() {
  const int32_t epoch = warps_[current_ / 32].epoch;
  arrive("sync_warp");
  warps_[current_ / 32].epoch = epoch + 1;
}

const void* Block::exchange(const char* operation, const void* value, size_t bytes) {
  Warp& warp = warps_[current_ / 32];
  // Two sets, since the first lane may come to the next exchange before the last has read this one.
  unsigned char* slots = warp.slots[warp.parity];
  std::memcpy(slots + current_ % 32 * kSlotBytes, value, bytes);
  arrive(operation);
  return slots;
}

void Block::wait_for_previous_kernel() { fibers_[current_]->waited = true; }

void Block::allocate(int offset, int bytes) {
  if (offset + bytes > launch_.shared_bytes) {
    fail("it takes " + std::to_string(offset + bytes) + " bytes of shared memory, the launch gave it " +
         std::to_string(launch_.shared_bytes));
  }
  const size_t array = fibers_[current_]->arrays++;
  if (array == ends_of_arrays_.size()) ends_of_arrays_.push_back(offset + bytes);
  if (ends_of_arrays_[array] != offset + bytes) fail("its arrays in shared memory differ from those of other threads");
}

Touch Block::now() const {
  const int warp = current_ / 32;
  return {static_cast<int16_t>(current_), static_cast<int16_t>(warp), epoch_, warps_[warp].epoch};
}

// Whether a barrier lies between what was done then and now, or it was the same thread's doing.
bool Block::ordered(const Touch& earlier, const Touch& now) {
  if (earlier.block_epoch < now.block_epoch || earlier.thread == now.thread) return true;
  return earlier.warp == now.warp && earlier.warp_epoch < now.warp_epoch;
}

void Block::note_read(int offset, size_t bytes) {
  const Touch touch = now();
  for (size_t i = offset / kGranule; i < (offset + bytes) / kGranule; ++i) {
    Granule& granule = granules_[i];
    if (!granule.written) fail("shared memory is read before it is written, at byte " + std::to_string(i * kGranule));
    if (!ordered(granule.write, touch)) {
      fail("shared memory is read without a barrier after thread " + std::to_string(granule.write.thread) +
           " wrote it, at byte " + std::to_string(i * kGranule));
    }
    Touch& read = granule.read;
    if (read.block_epoch != touch.block_epoch || read.thread == touch.thread) {
      read = touch;
    } else {
      read.thread = Touch::kSeveral;
      if (read.warp != touch.warp) read.warp = Touch::kSeveral;
      read.warp_epoch = std::max(read.warp_epoch, touch.warp_epoch);
    }
  }
}

void Block::check_write(const Granule& granule, const Touch& now, int offset) {
  if (!ordered(granule.read, now)) {
    fail("shared memory is written without a barrier after others read it, at byte " + std::to_string(offset));
  }
  if (!ordered(granule.write, now)) {
    fail("shared memory is written without a barrier after thread " + std::to_string(granule.write.thread) +
         " wrote it, at byte " + std::to_string(offset));
  }
}

void Block::note_write(int offset, size_t bytes) {
  const Touch touch = now();
  for (size_t i = offset / kGranule; i < (offset + bytes) / kGranule; ++i) {
    check_write(granules_[i], touch, static_cast<int>(i) * kGranule);
    granules_[i].written = true;
    granules_[i].atomic = false;
    granules_[i].write = touch;
  }
}

void Block::note_atomic(int offset, size_t bytes) {
  Touch touch = now();
  for (size_t i = offset / kGranule; i < (offset + bytes) / kGranule; ++i) {
    Granule& granule = granules_[i];
    if (!granule.written) fail("shared memory is added to before it is written");
    const bool with_atomics = granule.atomic && granule.write.block_epoch == epoch_;
    if (!with_atomics) check_write(granule, touch, static_cast<int>(i) * kGranule);
    granule.atomic = true;
    granule.write = touch;
    // Nobody's own: whoever reads it needs a barrier.
    granule.write.thread = granule.write.warp = Touch::kSeveral;
  }
}

void Block::begin_copy(int offset, const void* source) {
  note_write(offset, 16);
  for (int i = offset / kGranule; i < (offset + 16) / kGranule; ++i) granules_[i].written = false;
  fibers_[current_]->copies.back().push_back({offset, source});
}

void Block::commit_copies() { fibers_[current_]->copies.emplace_back(); }

void Block::wait_for_copies(int pending) {
  auto& groups = fibers_[current_]->copies;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const auto& copy : groups.front()) {
      if (copy.source == nullptr) {
        std::memset(shared(copy.offset), 0, 16);
      } else {
        std::memcpy(shared(copy.offset), copy.source, 16);
      }
      note_write(copy.offset, 16);
    }
    groups.pop_front();
  }
}

std::string Block::stuck() const {
  std::string message = std::string(launch_.name) + ", block " + std::to_string(index_) + ": ";
  if (finished_ > 0) message += std::to_string(finished_) + " threads have ended, and ";
  for (size_t warp = 0; warp < warps_.size(); ++warp) {
    if (warps_[warp].arrived > 0) {
      return message + std::to_string(warps_[warp].arrived) + " lanes of warp " + std::to_string(warp) + " wait at " +
             warps_[warp].operation + " for the others";
    }
  }
  return message + std::to_string(arrived_) + " of " + std::to_string(launch_.threads) +
         " threads wait at the barrier of the block";
}

void run(const Launch& launch, const std::function<void(Block&)>& kernel) {
  if (launch.blocks < 1 || launch.blocks > 0x7fffffff) {
    throw std::logic_error(std::string(launch.name) + ": a grid of " + std::to_string(launch.blocks) + " blocks");
  }
  if (launch.shared_bytes > kMostSharedBytes) {
    throw std::logic_error(std::string(launch.name) + ": " + std::to_string(launch.shared_bytes) +
                           " bytes of shared memory");
  }
  uint64_t random = seed_of_schedule();
  std::vector<int64_t> order(launch.blocks);
  std::iota(order.begin(), order.end(), 0);
  if (random != 0) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random(random) % i]);
  }
  Block block(launch, kernel, random);
  for (const int64_t index : order) block.run(index);
}

}  // namespace ggro::cuda::emulation
