#pragma once

#include <cstdint>
#include <string>

#include "ggro/candidate_scores.h"
#include "ggro/entropy_topk.h"
#include "ggro/entropy_topk_backward.h"
#include "ggro/prefix_attention.h"
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

// The k best of scores that a product has left on the device, of a whole vocabulary or of one slab of it after the
// other. A slab but the last ends where 4096 columns end.
struct ScoresTopKArgs {
  const float* scores;  // [rows, columns], unit column stride
  int64_t rows;
  int64_t columns;                // 1 .. 2^31 - 1
  int64_t row_stride;             // in elements
  int64_t k;                      // 1 .. columns
  int64_t first_column;           // of the slab: added to the indices
  const int64_t* column_indices;  // [rows, columns] with the strides of the scores, stand in for the indices; or null
  int64_t vocab;                  // columns of all slabs
  float temperature;
  float* sums;  // [rows, 3, ceil(vocab / 1024)], the same for all slabs; or null: no statistics
  float* values;
  int64_t* indices;       // both [rows, k]
  int64_t output_stride;  // in elements
  float* entropy;         // [rows], from the sums of all slabs, with the last; or null
  float* logsumexp;       // [rows]
};

// An id outside the table gives NaN.
int64_t candidate_scores_workspace(const CandidateScoresArgs& args);
void candidate_scores(const CandidateScoresArgs& args, void* workspace, const Stream& stream);

int64_t entropy_topk_workspace(const EntropyTopKArgs& args);
void entropy_topk(const EntropyTopKArgs& args, void* workspace, const Stream& stream);

int64_t entropy_topk_backward_workspace(const EntropyTopKBackwardArgs& args);
void entropy_topk_backward(const EntropyTopKBackwardArgs& args, void* workspace, const Stream& stream);

int64_t scores_topk_workspace(const ScoresTopKArgs& args);
void scores_topk(const ScoresTopKArgs& args, void* workspace, const Stream& stream);

// A uniform outside [0, 1) takes the first or the last candidate.
int64_t score_select_workspace(const ScoreSelectArgs& args);
void score_select(const ScoreSelectArgs& args, void* workspace, const Stream& stream);

}  // namespace ggro::cuda
