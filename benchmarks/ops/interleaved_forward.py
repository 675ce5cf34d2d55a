"""A model's forward with our op on its logits, against the two alone: together they must take the sum.

More would mean that the threads of torch and of the kernels stand in each other's way.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.ops.entropy_topk import eager as eager_entropy_topk
from benchmarks.registry import OURS, Case, Inputs, Provider
from ggro_kernels import entropy_topk

K = 25


def logits_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits[0]


@torch.no_grad()
def forward_and_ours(model: LlamaForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return entropy_topk(logits_of(model, ids), K)


@torch.no_grad()
def forward_and_eager(model: LlamaForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return eager_entropy_topk(logits_of(model, ids), K)


@torch.no_grad()
def forward_alone(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return logits_of(model, ids)


def ours_alone(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return entropy_topk(logits, K)


@torch.no_grad()
def its_logits(model: LlamaForCausalLM, ids: torch.Tensor) -> Inputs:
    return {"logits": logits_of(model, ids)}


def case(width: int, layers: int, vocabulary: int, tokens: int, **flags: Any) -> Case:
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=8 * width // 3 // 32 * 32,
        vocab_size=vocabulary,
    )

    def inputs() -> Inputs:
        return {"model": LlamaForCausalLM(config).eval(), "ids": torch.randint(vocabulary, (1, tokens))}

    weights = layers * (4 * width**2 + 3 * width * config.intermediate_size) + vocabulary * width
    return Case(
        op="interleaved_forward",
        label=f"{width} wide, {layers} layers, {tokens} x {vocabulary}",
        shape={"width": width, "layers": layers, "vocabulary": vocabulary, "tokens": tokens, "k": K},
        dtype=torch.float32,
        bytes=4 * (weights + tokens * vocabulary),
        flops=tokens * (2 * weights + 6 * vocabulary),
        inputs=inputs,
        providers=(
            Provider(OURS, forward_and_ours),
            Provider("forward + eager", forward_and_eager),
            Provider("forward alone", forward_alone, part=True),
            Provider("entropy_topk alone", ours_alone, prepare=its_logits, part=True),
        ),
        **flags,
    )


SMALL = case(64, 1, 1000, 3)

CASES = [
    case(512, 6, 32000, 1, quick=True, shown=True),
    case(512, 6, 32000, 16),
    case(512, 6, 128256, 8),
]

# There the two share no threads.
GPU_CASES: list[Case] = []
