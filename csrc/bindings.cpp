#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <utility>

#include "ggro/isa.h"
#include "ggro/ops.h"

namespace py = pybind11;

namespace {

// How a field of an argument struct comes from Python: addresses and dtype codes as integers, numbers as they are.
template <typename Field>
struct Wire {
  using Type = Field;
  static Field read(Type value) { return value; }
};

template <typename Pointee>
struct Wire<Pointee*> {
  using Type = uintptr_t;
  static Pointee* read(Type value) { return reinterpret_cast<Pointee*>(value); }
};

template <>
struct Wire<ggro::DType> {
  using Type = int;
  static ggro::DType read(Type value) { return static_cast<ggro::DType>(value); }
};

template <>
struct Wire<ggro::HeadsView> {
  using Type = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
  static ggro::HeadsView read(const Type& value) {
    const auto [address, batch_stride, head_stride, token_stride] = value;
    return {reinterpret_cast<const void*>(address), batch_stride, head_stride, token_stride};
  }
};

// Stands for a field of any type where fields are counted.
struct AnyField {
  template <typename T>
  operator T() const;
};

template <typename>
using ForEach = AnyField;

template <typename Args, typename... Fields>
constexpr auto has_room_for(int) -> decltype(Args{std::declval<Fields>()...}, true) {
  return true;
}
template <typename Args, typename... Fields>
constexpr bool has_room_for(long) {
  return false;
}

// Defines a function that takes the fields in this order. Tensors, their checks and their allocation belong to Python.
template <typename Args, typename... Fields>
void define(py::module_& m, const char* name, void (*op)(const Args&), Fields Args::*... fields) {
  static_assert(has_room_for<Args, ForEach<Fields>...>(0) && !has_room_for<Args, ForEach<Fields>..., AnyField>(0),
                "name every field of the argument struct once");
  m.def(
      name,
      [=](typename Wire<Fields>::Type... values) {
        Args args = {};
        ((args.*fields = Wire<Fields>::read(values)), ...);
        op(args);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

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
           &A::branch_key, &A::branch_value, &A::branch_starts, &A::prefix_lengths, &A::batch, &A::query_heads,
           &A::key_heads, &A::tokens, &A::prefix_tokens, &A::key_width, &A::value_width, &A::scale, &A::softcap,
           &A::window, &A::output, &A::num_threads);
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
