"""Reward head, combination with the logits and choice of a candidate in one call."""

from typing import NamedTuple

import torch

from ggro_kernels.checks import check_choice, check_floating, check_range, check_shape, check_temperature, check_tensor
from ggro_kernels.dispatch import check_impl
from ggro_kernels.score_select.ops import score_select_op


class ScoreSelect(NamedTuple):
    """Result of `score_select` for B rows of k candidates."""

    # Hides tuple.index, which nobody would look for here.
    index: torch.Tensor  # type: ignore[assignment]
    """[B] int64, the candidate taken, 0 .. k - 1."""
    reward: torch.Tensor
    """[B, k] fp32."""
    score: torch.Tensor
    """[B, k] fp32, what the choice was made by."""


def score_select(
    hidden: torch.Tensor,
    head: torch.Tensor,
    logits: torch.Tensor,
    weight: float,
    *,
    mode: str = "greedy",
    temperature: float = 1.0,
    uniforms: torch.Tensor | None = None,
    impl: str = "auto",
) -> ScoreSelect:
    """Score every candidate by `logit + weight * reward` and take one: a step of reward-guided search in one launch.

    Args:
        hidden: [B, k, d] reward model states at the candidates, fp32, bf16 or fp16 (fp64 by the reference only); any
            strides, B and d may be 0.
        head: [d], the linear reward head, one of the same dtypes.
        logits: [B, k] policy logits of the candidates, k >= 1, one of the same dtypes. -inf marks padding, whose score
            is -inf whatever its reward.
        weight: -1e30 .. 1e30, multiplies the rewards (w of ARGS).
        mode: "greedy" takes the first of the largest score, where -0.0 equals +0.0 and NaN is the largest;
            "categorical" samples from `softmax(score / temperature)` by the uniform given: the smallest j whose
            cumulative sum, in index order and fp64, exceeds `uniform * total`. Where the largest score is not finite
            it takes what "greedy" takes.
        temperature: 1e-30 .. 1e30, for "categorical".
        uniforms: [B] fp32 in [0, 1), with "categorical" and only with it.
        impl: "auto", "native", "triton" or "reference"; an explicit request runs or raises.

    Returns:
        `ScoreSelect(index[B], reward[B, k], score[B, k])`, detached from the inputs; reward and score are accumulated
        and returned in fp32 (fp64 if an input is fp64). A row's result does not depend on the other rows or on the
        number of threads.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices, mode, weight, temperature or impl; uniforms missing or not
            wanted; a uniform outside [0, 1) (checked on a CPU; on an accelerator the check would need a host sync).
        RuntimeError: the implementation asked for is not available.

    Source: ARGS (Khanov et al., 2024), score(v) = logit(v) + w r([x, v]) over the top k; its greedy and stochastic
    choices.
    """
    check_tensor("hidden", hidden, "[B, k, d]")
    check_tensor("head", head, "[d]", like=hidden)
    check_tensor("logits", logits, "[B, k]", like=hidden)
    check_floating("hidden", hidden)
    check_floating("head", head)
    check_floating("logits", logits)
    rows, candidates, width = hidden.shape
    if candidates < 1:
        raise ValueError(f"hidden must have one candidate or more, got shape {list(hidden.shape)}")
    check_shape("head", head, (width,), "hidden")
    check_shape("logits", logits, (rows, candidates), "hidden")
    check_range("weight", weight, -1e30, 1e30)
    check_temperature(temperature)
    check_choice("mode", mode, ("greedy", "categorical"))
    if (uniforms is None) != (mode == "greedy"):
        wanted = "needs uniforms [B]" if uniforms is None else "takes no uniforms: leave them out"
        raise ValueError(f"mode={mode!r} {wanted}")
    if uniforms is not None:
        check_tensor("uniforms", uniforms, "[B]", like=hidden)
        if uniforms.dtype != torch.float32:
            raise TypeError(f"uniforms must be float32, got {uniforms.dtype}")
        check_shape("uniforms", uniforms, (rows,), "hidden")
    check_impl(impl)
    return ScoreSelect(*score_select_op(hidden, head, logits, weight, temperature, uniforms, impl))
