#pragma once

// What kernels are written on: threads, barriers, exchange within a warp, shared memory, vector loads, launches.
//
// nvcc compiles it to the instructions of a GPU. Any other compiler compiles the very same kernels for the tests, which
// put `portable_emulated.h` on the include path: there the threads of a block are fibers, and misuse is an error.
//
// kFloatsAtOnce: how many floats a sequence of kernels should work on at once.
//
// A kernel is a struct with
//   using Args = ...;                        plain data, passed by value
//   static constexpr int kThreads = ...;     a multiple of 32
//   static constexpr int kBlocksAtOnce = ...;   if given: registers are to suffice for so many on a multiprocessor
//   static GGRO_DEVICE void run(Thread& thread, const Args& args);
// and is started by launch<Kernel>(name, blocks, shared_bytes, args, stream) with a one-dimensional grid.
//
// Thread: block(), index(), warp(), lane(); sync() for the block, sync_warp(); shuffle, shuffle_xor, shuffle_up,
// ballot, warp_sum, load_matrices, multiply_add_16x8x16 by all 32 lanes of a warp; shared<T>(count), which hands out
// shared memory to all threads in the same order; wait_for_previous_kernel() before what the kernel launched before
// wrote is read.
//
// Shared<T>: load(i), store(i, value), load_vector<N>(i), store_vector(i, vector), copy_async(i, source, exists),
// and atomic_add(i, value). Two threads may touch an element with a barrier between them only, unless both read it or
// both add to it.

#include <cstdint>

#include "ggro/cuda.h"

namespace ggro::cuda {

// N elements that one instruction moves where they take 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T data[N];
};

// Bytes of shared memory that thread.shared<T>(count) takes.
template <typename T>
constexpr int shared_bytes_of(int count) {
  return (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
}

}  // namespace ggro::cuda

#ifdef __CUDACC__
#include "portable_nvcc.h"
#else
#include "portable_emulated.h"
#endif
