#include "bindings_cuda.h"

#include "binding.h"

namespace ggro::binding {

void define_cuda(py::module_& m) {
  m.doc() = "CUDA kernels of ggro_kernels; called through ggro_kernels only.";
  m.def("obstacle", &cuda::obstacle);
  {
    using A = CandidateScoresArgs;
    define(m, "candidate_scores", cuda::candidate_scores_workspace, cuda::candidate_scores, &A::gradient,
           &A::gradient_dtype, &A::gradient_stride, &A::table, &A::table_dtype, &A::table_stride, &A::ids,
           &A::positions, &A::candidates, &A::vocab, &A::width, &A::scores);
  }
  {
    using A = EntropyTopKArgs;
    define(m, "entropy_topk", cuda::entropy_topk_workspace, cuda::entropy_topk, &A::logits, &A::dtype, &A::rows,
           &A::vocab, &A::row_stride, &A::k, &A::temperature, &A::entropy, &A::logsumexp, &A::values, &A::indices);
  }
  {
    using A = EntropyTopKBackwardArgs;
    define(m, "entropy_topk_backward", cuda::entropy_topk_backward_workspace, cuda::entropy_topk_backward,
           &A::entropy_gradient, &A::logsumexp_gradient, &A::values_gradient, &A::logits, &A::dtype, &A::rows,
           &A::vocab, &A::row_stride, &A::k, &A::entropy, &A::logsumexp, &A::indices, &A::temperature, &A::gradient);
  }
  {
    using A = LmHeadEntropyTopKArgs;
    define(m, "lm_head_entropy_topk", cuda::lm_head_entropy_topk_workspace, cuda::lm_head_entropy_topk, &A::hidden,
           &A::hidden_dtype, &A::hidden_stride, &A::weight, &A::weight_dtype, &A::weight_stride, &A::bias, &A::softcap,
           &A::temperature, &A::rows, &A::vocab, &A::width, &A::k, &A::entropy, &A::logsumexp, &A::values, &A::indices);
  }
  {
    using A = PrefixAttentionArgs;
    define(m, "prefix_attention", cuda::prefix_attention_workspace, cuda::prefix_attention, &A::dtype, &A::query,
           &A::prefix_key, &A::prefix_value, &A::branch_key, &A::branch_value, &A::branch_starts, &A::branch_ends,
           &A::prefix_lengths, &A::batch, &A::query_heads, &A::key_heads, &A::tokens, &A::prefix_tokens,
           &A::branch_tokens, &A::key_width, &A::value_width, &A::scale, &A::softcap, &A::window, &A::output);
  }
  {
    using A = ProjectTopKArgs;
    define(m, "project_topk", cuda::project_topk_workspace, cuda::project_topk, &A::gradient, &A::gradient_dtype,
           &A::gradient_stride, &A::table, &A::table_dtype, &A::table_stride, &A::bias, &A::forbidden, &A::positions,
           &A::vocab, &A::width, &A::k, &A::scores, &A::indices);
  }
  {
    using A = ScoreSelectArgs;
    define(m, "score_select", cuda::score_select_workspace, cuda::score_select, &A::hidden, &A::hidden_dtype,
           &A::hidden_row_stride, &A::hidden_candidate_stride, &A::head, &A::head_dtype, &A::logits, &A::logits_dtype,
           &A::uniforms, &A::rows, &A::candidates, &A::width, &A::weight, &A::temperature, &A::index, &A::reward,
           &A::score);
  }
}

}  // namespace ggro::binding
