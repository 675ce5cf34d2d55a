#pragma once

#include <cstdint>
#include <string>

#include "ggro/candidate_scores.h"
#include "ggro/entropy_topk.h"
#include "ggro/entropy_topk_backward.h"
#include "ggro/lm_head_entropy_topk.h"
#include "ggro/prefix_attention.h"
#include "ggro/project_topk.h"
#include "ggro/score_select.h"

// The kernels for NVIDIA GPUs (sm_80 and newer). Arguments are those of the CPU's, with addresses on the device;
// `num_threads` is not looked at. Every op has a workspace on the device, whose bytes follow from shapes alone, so that
// a call can be captured in a CUDA graph: no allocation, no synchronisation. Nothing is checked on the device; what the
// CPU would throw for is said here.
//
// They throw std::runtime_error where CUDA refuses a launch.

namespace ggro::cuda {

// Where a launch goes: the device's number and its cudaStream_t.
struct Stream {
  int device;
  void* handle;
};

// Why kernels cannot run on a device: no driver, one that is too old, a GPU they were not compiled for; "" if they can.
std::string obstacle(int device);

// An id outside the table gives NaN.
int64_t candidate_scores_workspace(const CandidateScoresArgs& args);
void candidate_scores(const CandidateScoresArgs& args, void* workspace, const Stream& stream);

int64_t entropy_topk_workspace(const EntropyTopKArgs& args);
void entropy_topk(const EntropyTopKArgs& args, void* workspace, const Stream& stream);

int64_t entropy_topk_backward_workspace(const EntropyTopKBackwardArgs& args);
void entropy_topk_backward(const EntropyTopKBackwardArgs& args, void* workspace, const Stream& stream);

int64_t lm_head_entropy_topk_workspace(const LmHeadEntropyTopKArgs& args);
void lm_head_entropy_topk(const LmHeadEntropyTopKArgs& args, void* workspace, const Stream& stream);

int64_t project_topk_workspace(const ProjectTopKArgs& args);
void project_topk(const ProjectTopKArgs& args, void* workspace, const Stream& stream);

// A token whose branch start or end or whose row's prefix length is out of range gets NaN. Fewer than 2^31 rows of a
// key head, tokens of a prefix, tokens of branches, and columns.
int64_t prefix_attention_workspace(const PrefixAttentionArgs& args);
void prefix_attention(const PrefixAttentionArgs& args, void* workspace, const Stream& stream);

// A uniform outside [0, 1) takes the first or the last candidate.
int64_t score_select_workspace(const ScoreSelectArgs& args);
void score_select(const ScoreSelectArgs& args, void* workspace, const Stream& stream);

}  // namespace ggro::cuda
