#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "ggro/types.h"
#include "portable.h"

#define GGRO_DEVICE __device__ __forceinline__

namespace ggro::cuda {

// 32 MB, which stay in the L2 cache of the large GPUs from one kernel to the next.
constexpr int64_t kFloatsAtOnce = 1 << 23;

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
class Shared {
 public:
  GGRO_DEVICE explicit Shared(T* data) : data_(data) {}

  GGRO_DEVICE T load(int i) const { return data_[i]; }
  GGRO_DEVICE void store(int i, T value) const { data_[i] = value; }
  GGRO_DEVICE void atomic_add(int i, T value) const { atomicAdd(data_ + i, value); }

  template <int N>
  GGRO_DEVICE Vector<T, N> load_vector(int i) const {
    return *reinterpret_cast<const Vector<T, N>*>(data_ + i);
  }
  template <int N>
  GGRO_DEVICE void store_vector(int i, const Vector<T, N>& value) const {
    *reinterpret_cast<Vector<T, N>*>(data_ + i) = value;
  }

  // Begins to copy the 16 bytes at `source` to element i, or zeros where nothing exists there; they are there for this
  // thread after wait_for_copies.
  GGRO_DEVICE void copy_async(int i, const T* source, bool exists = true) const {
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(data_ + i));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(exists ? 16 : 0)
                 : "memory");
  }

 private:
  friend class Thread;
  T* data_;
};

class Thread {
 public:
  GGRO_DEVICE explicit Thread(unsigned char* shared) : shared_(shared) {}

  GGRO_DEVICE int64_t block() const { return blockIdx.x; }
  GGRO_DEVICE int index() const { return static_cast<int>(threadIdx.x); }
  GGRO_DEVICE int warp() const { return static_cast<int>(threadIdx.x) / 32; }
  GGRO_DEVICE int lane() const { return static_cast<int>(threadIdx.x) % 32; }

  GGRO_DEVICE void sync() const { __syncthreads(); }
  GGRO_DEVICE void sync_warp() const { __syncwarp(); }

  template <typename T>
  GGRO_DEVICE T shuffle(T value, int source) const {
    return __shfl_sync(kAllLanes, value, source);
  }
  template <typename T>
  GGRO_DEVICE T shuffle_xor(T value, int mask) const {
    return __shfl_xor_sync(kAllLanes, value, mask);
  }
  // The value of lane - delta; that of the lane itself where there is none.
  template <typename T>
  GGRO_DEVICE T shuffle_up(T value, int delta) const {
    return __shfl_up_sync(kAllLanes, value, delta);
  }
  GGRO_DEVICE unsigned ballot(bool predicate) const { return __ballot_sync(kAllLanes, predicate); }
  GGRO_DEVICE unsigned warp_sum(unsigned value) const { return __reduce_add_sync(kAllLanes, value); }

  // Four matrices of 8 x 8 elements of 16 bits: lane 8 * j + i says where row i of matrix j begins, and r[j] holds
  // elements 2 * (lane % 4) and the next of row lane / 4 of matrix j; of its transpose where kTransposed.
  template <bool kTransposed, typename T>
  GGRO_DEVICE void load_matrices(const Shared<T>& shared, int row, uint32_t (&r)[4]) const {
    static_assert(sizeof(T) == 2);
    const unsigned source = static_cast<unsigned>(__cvta_generic_to_shared(shared.data_ + row));
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(source)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(source)
                   : "memory");
    }
  }

  // c += a * b by the tensor cores, in fp32: a [16, 16], b [16, 8], c [16, 8], spread over the lanes as PTX has it for
  // mma.m16n8k16. T is BFloat16 or Float16; words hold two of them.
  template <typename T>
  GGRO_DEVICE void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    if constexpr (std::is_same_v<T, BFloat16>) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }

  // The copies begun so far are one group, committed in order.
  GGRO_DEVICE void commit_copies() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // All groups of this thread but the last `Pending` have arrived.
  template <int Pending>
  GGRO_DEVICE void wait_for_copies() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
  }

  template <typename T>
  GGRO_DEVICE Shared<T> shared(int count) {
    T* data = reinterpret_cast<T*>(shared_);
    shared_ += shared_bytes_of<T>(count);
    return Shared<T>(data);
  }

  GGRO_DEVICE void wait_for_previous_kernel() const {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
  }

 private:
  unsigned char* shared_;
};

template <typename T, int N>
GGRO_DEVICE Vector<T, N> load_vector(const T* source) {
  return *reinterpret_cast<const Vector<T, N>*>(source);
}

template <typename T, int N>
GGRO_DEVICE void store_vector(T* target, const Vector<T, N>& value) {
  if constexpr (sizeof(value) == 16) {
    uint32_t words[4];
    memcpy(words, &value, sizeof(words));
    // nvcc would merge a plain store with one of single elements on another path.
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  } else {
    *reinterpret_cast<Vector<T, N>*>(target) = value;
  }
}

// The larger; NaN if one of them is.
GGRO_DEVICE float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// a * b, rounded: never part of a fused multiply-add.
GGRO_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }

// 2^x, with a relative error of 2^-22; zero where that is below 2^-126.
GGRO_DEVICE float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Bits [8 * bytes, 8 * bytes + 32) of the two words, low first.
GGRO_DEVICE uint32_t shifted_word(uint32_t low, uint32_t high, int bytes) {
  return __funnelshift_r(low, high, 8 * bytes);
}

GGRO_DEVICE float to_float(float x) { return x; }
GGRO_DEVICE float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
GGRO_DEVICE float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <typename T>
GGRO_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else {
    return {__half_as_ushort(__float2half_rn(x))};
  }
}

GGRO_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
GGRO_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// Blocks that a multiprocessor is to have room for, by their registers; 0: the compiler chooses.
template <typename Kernel, typename = void>
constexpr int kBlocksAtOnce = 0;
template <typename Kernel>
constexpr int kBlocksAtOnce<Kernel, std::void_t<decltype(Kernel::kBlocksAtOnce)>> = Kernel::kBlocksAtOnce;

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, kBlocksAtOnce<Kernel>)
    entry(const __grid_constant__ typename Kernel::Args args) {
  extern __shared__ __align__(16) unsigned char shared[];
  Thread thread(shared);
  Kernel::run(thread, args);
}

// Makes a device current, and the one before it again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = previous_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// What CUDA says against a launch of the kernel on a device; "" where it says nothing.
template <typename Kernel>
std::string why_not(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, entry<Kernel>), "the CUDA kernels do not run here");
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

inline bool launches_overlap(int device) {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  return major >= 9;
}

// Starts `blocks` blocks with so much shared memory. `overlaps`: it may start while the kernel launched before is still
// at work, and calls wait_for_previous_kernel; only for a kernel whose predecessor was launched by us.
// Throws std::runtime_error where the launch fails.
template <typename Kernel>
void launch(const char* name, int64_t blocks, int shared_bytes, const typename Kernel::Args& args, const Stream& stream,
            bool overlaps = false) {
  static_assert(Kernel::kThreads % 32 == 0);
  if (blocks > 0x7fffffff) {
    throw std::runtime_error(std::string(name) + ": more blocks than a grid has: split the rows");
  }
  const DeviceGuard guard(stream.device);
  constexpr int kSharedBytesByDefault = 48 * 1024;
  if (shared_bytes > kSharedBytesByDefault) {
    check(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &attribute;
  config.numAttrs = overlaps && launches_overlap(stream.device) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, entry<Kernel>, args), name);
}

}  // namespace ggro::cuda
