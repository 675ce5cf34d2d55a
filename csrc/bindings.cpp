#include "binding.h"
#include "bindings_cuda.h"
#include "ggro/isa.h"

namespace py = pybind11;
using ggro::binding::define;

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of ggro_kernels; called through ggro_kernels only.";
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#ifdef __SANITIZE_ADDRESS__
  m.attr("sanitized") = true;
#else
  m.attr("sanitized") = false;
#endif
  m.def("available_isas", &ggro::available_isas);
  m.def("selected_isa", &ggro::selected_isa);
#ifdef GGRO_CUDA_KERNELS
  py::module_ cuda = m.def_submodule("cuda");
  ggro::binding::define_cuda(cuda);
#endif
  {
    using A = ggro::BatchInvariantLinearArgs;
    define(m, "batch_invariant_linear", ggro::batch_invariant_linear, &A::x, &A::weight, &A::weight_stride, &A::bias,
           &A::dtype, &A::rows, &A::outputs, &A::width, &A::output, &A::num_threads);
  }
  {
    using A = ggro::BatchInvariantLinearBackwardArgs;
    define(m, "batch_invariant_linear_backward", ggro::batch_invariant_linear_backward, &A::gradient, &A::weight,
           &A::weight_stride, &A::dtype, &A::rows, &A::outputs, &A::width, &A::x_gradient, &A::num_threads);
  }
  {
    using A = ggro::CandidateScoresArgs;
    define(m, "candidate_scores", ggro::candidate_scores, &A::gradient, &A::gradient_dtype, &A::gradient_stride,
           &A::table, &A::table_dtype, &A::table_stride, &A::ids, &A::positions, &A::candidates, &A::vocab, &A::width,
           &A::scores, &A::num_threads);
  }
  {
    using A = ggro::EntropyTopKArgs;
    define(m, "entropy_topk", ggro::entropy_topk, &A::logits, &A::dtype, &A::rows, &A::vocab, &A::row_stride, &A::k,
           &A::temperature, &A::entropy, &A::logsumexp, &A::values, &A::indices, &A::num_threads);
  }
  {
    using A = ggro::EntropyTopKBackwardArgs;
    define(m, "entropy_topk_backward", ggro::entropy_topk_backward, &A::entropy_gradient, &A::logsumexp_gradient,
           &A::values_gradient, &A::logits, &A::dtype, &A::rows, &A::vocab, &A::row_stride, &A::k, &A::entropy,
           &A::logsumexp, &A::indices, &A::temperature, &A::gradient, &A::num_threads);
  }
  {
    using A = ggro::LmHeadEntropyTopKArgs;
    define(m, "lm_head_entropy_topk", ggro::lm_head_entropy_topk, &A::hidden, &A::hidden_dtype, &A::hidden_stride,
           &A::weight, &A::weight_dtype, &A::weight_stride, &A::bias, &A::softcap, &A::temperature, &A::rows, &A::vocab,
           &A::width, &A::k, &A::entropy, &A::logsumexp, &A::values, &A::indices, &A::num_threads);
  }
  {
    using A = ggro::MergePartialsArgs;
    define(m, "merge_partials", ggro::merge_partials, &A::entropy, &A::logsumexp, &A::values, &A::dtype, &A::indices,
           &A::offsets, &A::shards, &A::rows, &A::k, &A::merged_entropy, &A::merged_logsumexp, &A::merged_values,
           &A::merged_indices, &A::num_threads);
  }
  {
    using A = ggro::ProjectTopKArgs;
    define(m, "project_topk", ggro::project_topk, &A::gradient, &A::gradient_dtype, &A::gradient_stride, &A::table,
           &A::table_dtype, &A::table_stride, &A::bias, &A::forbidden, &A::positions, &A::vocab, &A::width, &A::k,
           &A::scores, &A::indices, &A::num_threads);
  }
  {
    using A = ggro::PrefixAttentionArgs;
    define(m, "prefix_attention", ggro::prefix_attention, &A::dtype, &A::query, &A::prefix_key, &A::prefix_value,
           &A::branch_key, &A::branch_value, &A::branch_starts, &A::branch_ends, &A::prefix_lengths, &A::batch,
           &A::query_heads, &A::key_heads, &A::tokens, &A::prefix_tokens, &A::branch_tokens, &A::key_width,
           &A::value_width, &A::scale, &A::softcap, &A::window, &A::output, &A::num_threads);
  }
  {
    using A = ggro::PrefixAttentionBackwardArgs;
    define(m, "prefix_attention_backward", ggro::prefix_attention_backward, &A::dtype, &A::gradient, &A::query,
           &A::prefix_key, &A::prefix_value, &A::branch_key, &A::branch_value, &A::branch_starts, &A::branch_ends,
           &A::prefix_lengths, &A::batch, &A::query_heads, &A::key_heads, &A::tokens, &A::prefix_tokens,
           &A::branch_tokens, &A::key_width, &A::value_width, &A::scale, &A::softcap, &A::window, &A::query_gradient,
           &A::key_gradient, &A::value_gradient, &A::num_threads);
  }
  {
    using A = ggro::ScoreSelectArgs;
    define(m, "score_select", ggro::score_select, &A::hidden, &A::hidden_dtype, &A::hidden_row_stride,
           &A::hidden_candidate_stride, &A::head, &A::head_dtype, &A::logits, &A::logits_dtype, &A::uniforms, &A::rows,
           &A::candidates, &A::width, &A::weight, &A::temperature, &A::index, &A::reward, &A::score, &A::num_threads);
  }
  for (const auto& [name, op] : {std::pair("weighted_bt_loss", ggro::weighted_bt_loss),
                                 std::pair("weighted_bt_loss_backward", ggro::weighted_bt_loss_backward)}) {
    using A = ggro::WeightedBTLossArgs;
    define(m, name, op, &A::chosen_rewards, &A::chosen_length, &A::chosen_stride, &A::rejected_rewards,
           &A::rejected_length, &A::rejected_stride, &A::dtype, &A::chosen_positions, &A::rejected_positions,
           &A::weights, &A::weights_dtype, &A::rows, &A::pairs, &A::mean, &A::loss, &A::loss_gradient,
           &A::chosen_gradient, &A::rejected_gradient, &A::num_threads);
  }
}
