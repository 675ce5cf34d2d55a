#pragma once

#include <csetjmp>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace ggro::cuda::emulation {

constexpr int kGranule = 2;
constexpr int kSlotBytes = 32;

struct Launch {
  const char* name;
  int64_t blocks;
  int threads;
  int shared_bytes;
  bool overlaps;
};

// Throws std::logic_error that says where the running thread is; only while one runs.
[[noreturn]] void fail(const std::string& what);

void check_alignment(const void* address, size_t bytes);

// Who touched a piece of shared memory last, and when.
struct Touch {
  static constexpr int16_t kNobody = -1;
  static constexpr int16_t kSeveral = -2;
  int16_t thread = kNobody;
  int16_t warp = kNobody;
  int32_t block_epoch = -1;
  int32_t warp_epoch = -1;
};

struct Granule {
  bool written = false;
  bool atomic = false;
  Touch write;
  Touch read;
};

// One block at work: its fibers, its shared memory, and whom they wait for.
class Block {
 public:
  Block(const Launch& launch, const std::function<void(Block&)>& kernel, uint64_t seed);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs all threads to their end; throws what one of them threw.
  void run(int64_t index);

  int64_t index() const { return index_; }
  int current() const { return current_; }
  std::string where() const;

  void sync();
  void sync_warp();
  const void* exchange(const char* operation, const void* value, size_t bytes);
  void wait_for_previous_kernel();

  void allocate(int offset, int bytes);
  unsigned char* shared(int offset) { return shared_.data() + offset; }
  void note_read(int offset, size_t bytes);
  void note_write(int offset, size_t bytes);
  void note_atomic(int offset, size_t bytes);
  void begin_copy(int offset, const void* source);
  void commit_copies();
  void wait_for_copies(int pending);

 private:
  struct Fiber;
  struct Warp {
    int arrived = 0;
    int parity = 0;
    int32_t epoch = 0;
    const char* operation = nullptr;
    alignas(kSlotBytes) unsigned char slots[2][32 * kSlotBytes];
  };

  static void enter(unsigned low, unsigned high);
  void work();
  void yield();
  void resume(int thread);
  void arrive(const char* operation);
  static bool ordered(const Touch& earlier, const Touch& now);
  static void check_write(const Granule& granule, const Touch& now, int offset);
  Touch now() const;
  std::string stuck() const;

  Launch launch_;
  const std::function<void(Block&)>& kernel_;
  uint64_t random_;
  int64_t index_ = -1;
  int current_ = -1;
  int32_t epoch_ = 0;
  int arrived_ = 0;
  int finished_ = 0;
  std::exception_ptr error_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> runnable_;
  std::vector<int> ends_of_arrays_;
  std::vector<unsigned char> shared_;
  std::vector<Granule> granules_;
  jmp_buf scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

// Runs all blocks of a launch, one after another.
void run(const Launch& launch, const std::function<void(Block&)>& kernel);

}  // namespace ggro::cuda::emulation
