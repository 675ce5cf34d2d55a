#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "ggro/isa.h"
#include "ggro/ops.h"

namespace ggro {
namespace {

struct CpuKernels {
  const char* isa;
  bool available;
#define GGRO_MEMBER(op, Args) void (*op)(const Args&);
  GGRO_OPS(GGRO_MEMBER)
#undef GGRO_MEMBER
};

#define GGRO_BASELINE(op, Args) cpu::baseline::op,
#define GGRO_AVX2(op, Args) cpu::avx2::op,
#define GGRO_AVX512(op, Args) cpu::avx512::op,
#define GGRO_AVX512BF16(op, Args) cpu::avx512bf16::op,

#ifdef GGRO_X86_KERNELS
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Narrowest first.
const std::vector<CpuKernels>& compiled_kernels() {
  static const std::vector<CpuKernels> kernels = {
      {"baseline", true, GGRO_OPS(GGRO_BASELINE)},
#ifdef GGRO_X86_KERNELS
      {"avx2", has_avx2(), GGRO_OPS(GGRO_AVX2)},
      {"avx512", has_avx512(), GGRO_OPS(GGRO_AVX512)},
      {"avx512bf16", has_avx512() && __builtin_cpu_supports("avx512bf16"), GGRO_OPS(GGRO_AVX512BF16)},
#endif
  };
  return kernels;
}

#undef GGRO_BASELINE
#undef GGRO_AVX2
#undef GGRO_AVX512
#undef GGRO_AVX512BF16

const CpuKernels& selected_kernels() {
  const std::vector<CpuKernels>& kernels = compiled_kernels();
  // Read at every call, so that a process can compare the paths.
  const char* wanted = std::getenv("GGRO_CPU_ISA");
  const bool choose_widest = wanted == nullptr || *wanted == '\0';
  for (auto it = kernels.rbegin(); it != kernels.rend(); ++it) {
    if (it->available && (choose_widest || std::string(wanted) == it->isa)) return *it;
  }
  std::string names;
  for (const std::string& name : available_isas()) names += (names.empty() ? "" : ", ") + name;
  throw std::invalid_argument("GGRO_CPU_ISA is '" + std::string(wanted) +
                              "', but this build and processor offer: " + names);
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const CpuKernels& kernels : compiled_kernels()) {
    if (kernels.available) names.emplace_back(kernels.isa);
  }
  return names;
}

std::string selected_isa() { return selected_kernels().isa; }

#define GGRO_DEFINE(op, Args) \
  void op(const Args& args) { selected_kernels().op(args); }
GGRO_OPS(GGRO_DEFINE)
#undef GGRO_DEFINE

}  // namespace ggro
