"""A decode step on the CPU with our cache, with transformers' growing one, and as `generate` does it, by prefix length.

    python -m benchmarks.decode_cache [--prefix 128 1024 4096] [--new-tokens 32] [--threads 1 2] [--rounds 5]

A Llama-shaped policy, 512 wide, 6 layers, fp32, random weights. Milliseconds a token after the first one, so without
the prefill; medians of interleaved rounds. "recorded" is the step as it is decoded; "static" is the one that it is a
recording of, with `prefix_attention`, run without recording; the others are ordinary forward passes.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PretrainedConfig
from transformers.generation.streamers import BaseStreamer

from ggro_hf import PREFIX_ATTENTION, Greedy, step_pool
from ggro_hf.decoding.base import Request
from ggro_hf.graphs import CAPTURES

Respond = Callable[[BaseStreamer], list[int]]
"""Decodes, and hands every token to the streamer."""


class Clock(BaseStreamer):
    """The times at which prompt and tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass

    def seconds_per_token(self) -> float:
        """From the first token of the response to the last."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


class Repeated:
    """In place of a capture: the function again, and no copy of its results."""

    asynchronous = False

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self._function = function
        self.outputs = function()

    def replay(self) -> None:
        for output, result in zip(tree_leaves(self.outputs), tree_leaves(self._function()), strict=True):
            # A reader has no packed results on the CPU.
            if output is not None:
                output.copy_(result)


def build_policy(longest: int, vocabulary: int) -> LlamaForCausalLM:
    """Seeded; it never ends by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1376,
        vocab_size=vocabulary,
        max_position_embeddings=longest,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def generate(policy: LlamaForCausalLM, prompt: list[int], tokens: int, streamer: BaseStreamer) -> list[int]:
    """transformers' own greedy search."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = policy.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, streamer=streamer)
    return output[0, len(prompt) :].tolist()


def greedy(
    policy: LlamaForCausalLM,
    prompt: list[int],
    tokens: int,
    within: Callable[[], AbstractContextManager[None]],
    streamer: BaseStreamer,
) -> list[int]:
    """Our greedy search, with something changed."""
    with within():
        return Greedy(streamer=streamer).respond(Request(policy, list(prompt), tokens, frozenset())).token_ids


@contextmanager
def growing_cache() -> Iterator[None]:
    """The same loop on a cache that appends with `torch.cat`."""

    def make(config: PretrainedConfig, capacity: int) -> DynamicCache:
        return DynamicCache(config=config)

    with ordinary_passes(), mock.patch.object(step_pool, "RewindableCache", make):
        yield


@contextmanager
def attending(policy: LlamaForCausalLM) -> Iterator[None]:
    """With our attention in place of sdpa, the prefill's included."""
    policy.set_attn_implementation(PREFIX_ATTENTION)
    try:
        with ordinary_passes():
            yield
    finally:
        policy.set_attn_implementation("sdpa")


@contextmanager
def ordinary_passes() -> Iterator[None]:
    """Decoding without captured steps."""
    with mock.patch.dict(CAPTURES):
        del CAPTURES["cpu"]
        yield


@contextmanager
def static_step() -> Iterator[None]:
    """Decoding by the pass that would be recorded."""
    idle = mock.patch.object(step_pool, "_idle", type(step_pool._idle)())
    with mock.patch.dict(CAPTURES, {"cpu": Repeated}), idle:
        yield


def measure(policy: LlamaForCausalLM, prompt: list[int], new_tokens: int, rounds: int) -> dict[str, float]:
    """Milliseconds a token of every way; the tokens of all are the same."""
    request = (policy, prompt, 1 + new_tokens)
    ways: dict[str, Respond] = {
        "our cache": partial(greedy, *request, ordinary_passes),
        "our cache, recorded": partial(greedy, *request, nullcontext),
        "our cache, prefix_attention": partial(greedy, *request, partial(attending, policy)),
        "our cache, static": partial(greedy, *request, static_step),
        "DynamicCache": partial(greedy, *request, growing_cache),
        "generate": partial(generate, *request),
    }
    responses = {name: respond(Clock()) for name, respond in ways.items()}
    assert len({tuple(tokens) for tokens in responses.values()}) == 1
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, respond in ways.items():
            clock = Clock()
            respond(clock)
            seconds[name].append(clock.seconds_per_token())
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prefix", type=int, nargs="+", default=[128, 1024, 4096], metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    policy = build_policy(max(arguments.prefix) + arguments.new_tokens + 1, arguments.vocabulary)
    runs = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for prefix in arguments.prefix:
            prompt = torch.randint(3, arguments.vocabulary, (prefix,)).tolist()
            milliseconds = measure(policy, prompt, arguments.new_tokens, arguments.rounds)
            runs.append({"threads": threads, "prefix": prefix, "milliseconds_per_token": milliseconds})
            ours = milliseconds["our cache"]
            cells = ", ".join(f"{name} {ms:.2f} ms ({ms / ours:.2f}x)" for name, ms in milliseconds.items())
            print(f"{threads} thread(s), prefix {prefix}: {cells}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "runs": runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
