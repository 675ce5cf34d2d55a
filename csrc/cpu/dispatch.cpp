#include <cstdlib>
#include <stdexcept>

#include "ggro/isa.h"
#include "kernels.h"

namespace ggro {
namespace {

struct CpuKernels {
  const char* isa;
  bool available;
  void (*entropy_topk)(const EntropyTopKArgs&);
  void (*candidate_scores)(const CandidateScoresArgs&);
};

// Narrowest first.
const std::vector<CpuKernels>& compiled_kernels() {
  static const std::vector<CpuKernels> kernels = {
      {"baseline", true, cpu::baseline::entropy_topk, cpu::baseline::candidate_scores},
#ifdef GGRO_X86_KERNELS
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       cpu::avx2::entropy_topk, cpu::avx2::candidate_scores},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       cpu::avx512::entropy_topk, cpu::avx512::candidate_scores},
#endif
  };
  return kernels;
}

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

void entropy_topk(const EntropyTopKArgs& args) { selected_kernels().entropy_topk(args); }

int64_t candidate_scores(const CandidateScoresArgs& args) {
  const int64_t count = args.positions * args.candidates;
  for (int64_t i = 0; i < count; ++i) {
    if (args.ids[i] < 0 || args.ids[i] >= args.vocab) return i;
  }
  selected_kernels().candidate_scores(args);
  return -1;
}

}  // namespace ggro
