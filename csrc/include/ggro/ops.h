#pragma once

#include "ggro/batch_invariant_linear.h"
#include "ggro/candidate_scores.h"
#include "ggro/entropy_topk.h"
#include "ggro/entropy_topk_backward.h"
#include "ggro/lm_head_entropy_topk.h"
#include "ggro/merge_partials.h"
#include "ggro/prefix_attention.h"
#include "ggro/project_topk.h"
#include "ggro/score_select.h"
#include "ggro/weighted_bt_loss.h"

// Every op, by function and argument struct: void function(const Args&). The declarations, the choice of instruction
// set and the public entry points are all generated from this list.
#define GGRO_OPS(X)                                                    \
  X(batch_invariant_linear, BatchInvariantLinearArgs)                  \
  X(batch_invariant_linear_backward, BatchInvariantLinearBackwardArgs) \
  X(candidate_scores, CandidateScoresArgs)                             \
  X(entropy_topk, EntropyTopKArgs)                                     \
  X(entropy_topk_backward, EntropyTopKBackwardArgs)                    \
  X(lm_head_entropy_topk, LmHeadEntropyTopKArgs)                       \
  X(merge_partials, MergePartialsArgs)                                 \
  X(prefix_attention, PrefixAttentionArgs)                             \
  X(prefix_attention_backward, PrefixAttentionBackwardArgs)            \
  X(project_topk, ProjectTopKArgs)                                     \
  X(score_select, ScoreSelectArgs)                                     \
  X(weighted_bt_loss, WeightedBTLossArgs)                              \
  X(weighted_bt_loss_backward, WeightedBTLossArgs)

namespace ggro {

#define GGRO_DECLARE(op, Args) void op(const Args& args);
GGRO_OPS(GGRO_DECLARE)
#undef GGRO_DECLARE

}  // namespace ggro
