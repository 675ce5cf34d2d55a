"""Reward head, combination with the logits and choice, against the launches that it takes in torch."""

import torch

from benchmarks.registry import Case, Inputs, Provider, compiled, ours

WEIGHT = 1.5


def eager(
    hidden: torch.Tensor, head: torch.Tensor, logits: torch.Tensor, weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Head, scaling, sum, argmax, with the conversion to fp32."""
    reward = (hidden @ head).float()
    score = logits.float() + weight * reward
    return score.argmax(-1), reward, score


def eager_categorical(
    hidden: torch.Tensor,
    head: torch.Tensor,
    logits: torch.Tensor,
    weight: float,
    mode: str,
    temperature: float,
    uniforms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, with a softmax, its cumulative sum and a search."""
    _, reward, score = eager(hidden, head, logits, weight)
    cumulative = (score / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, uniforms[:, None], right=True)[:, 0], reward, score


def case(rows: int, k: int, width: int, dtype: torch.dtype, mode: str = "greedy", **flags: bool) -> Case:
    def inputs() -> Inputs:
        plain = {
            "hidden": torch.randn(rows, k, width).to(dtype),
            "head": (width**-0.5 * torch.randn(width)).to(dtype),
            "logits": torch.randn(rows, k).to(dtype),
            "weight": WEIGHT,
        }
        if mode == "greedy":
            return plain
        return {**plain, "mode": mode, "temperature": 0.7, "uniforms": torch.rand(rows)}

    baseline = eager if mode == "greedy" else eager_categorical
    return Case(
        op="score_select",
        label=f"{rows} x {k} x {width}, {mode}",
        shape={"rows": rows, "k": k, "width": width},
        dtype=dtype,
        bytes=(rows * k * (width + 1) + width) * dtype.itemsize,
        flops=2 * rows * k * (width + 1),
        inputs=inputs,
        providers=(ours("score_select"), Provider("eager", baseline), compiled(baseline)),
        **flags,
    )


SMALL = case(3, 5, 64, torch.float32, "categorical")

CASES = [
    case(1, 10, 4096, torch.float32, shown=True, quick=True),
    case(1, 30, 4096, torch.bfloat16),
    case(16, 30, 4096, torch.float32, shown=True),
    case(16, 30, 4096, torch.float32, "categorical"),
]

GPU_CASES = [
    case(1, 30, 4096, torch.bfloat16, quick=True, shown=True),
    case(1, 30, 4096, torch.bfloat16, "categorical"),
    case(16, 30, 4096, torch.bfloat16, shown=True),
]
