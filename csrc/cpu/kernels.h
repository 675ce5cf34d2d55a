#pragma once

#include "ggro/candidate_scores.h"
#include "ggro/entropy_topk.h"

// The same kernel sources are compiled once per instruction set, each time into its own namespace.
#define GGRO_DECLARE_CPU_KERNELS(isa)                     \
  namespace ggro::cpu::isa {                              \
  void entropy_topk(const EntropyTopKArgs& args);         \
  void candidate_scores(const CandidateScoresArgs& args); \
  }

GGRO_DECLARE_CPU_KERNELS(baseline)
GGRO_DECLARE_CPU_KERNELS(avx2)
GGRO_DECLARE_CPU_KERNELS(avx512)

#undef GGRO_DECLARE_CPU_KERNELS
