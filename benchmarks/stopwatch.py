"""Where the time of a response goes: the policy's and the reward model's passes, our kernels, and the rest."""

import functools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ggro_hf import RewardModel, reading
from ggro_hf.decode_step import DecodeStep
from ggro_hf.decoding import segment_decoding
from ggro_hf.policy_lanes import LaneStep

PARTS = ("policy forward", "kernels", "reward forward", "reward backward")


class Stopwatch:
    """Time of the parts of a run: on a GPU the time of its stream, from events in it, else that of the clock.

    A part on a GPU lasts from its first kernel's start to its last one's end: it has in it what the GPU waits for the
    host within it, but not what it waits for in between.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._starts: dict[str, Any] = {}
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def start(self, part: str) -> None:
        """Begin a part; parts of one name do not overlap."""
        self._starts[part] = self._now()

    def stop(self, part: str) -> None:
        """End it."""
        self._spans[part].append((self._starts.pop(part), self._now()))

    def seconds(self) -> dict[str, float]:
        """Of each part; waits for the device."""
        if self._device.type != "cuda":
            return {part: sum(end - start for start, end in spans) for part, spans in self._spans.items()}
        torch.cuda.synchronize(self._device)
        return {part: sum(start.elapsed_time(end) for start, end in spans) / 1e3 for part, spans in self._spans.items()}

    def calls(self) -> dict[str, int]:
        """How often each part ran."""
        return {part: len(spans) for part, spans in self._spans.items()}

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


@contextmanager
def timed(stopwatch: Stopwatch, policy: nn.Module, reward: RewardModel) -> Iterator[None]:
    """Measure PARTS of whatever decodes with these two models within the context.

    A captured step is a policy forward with the kernel that reads its logits. It must have been captured before.
    """
    backbone, head = reward.model.base_model, reward.model.score

    def start(part: str, *_: Any) -> None:
        stopwatch.start(part)

    def stop(part: str, *_: Any) -> None:
        stopwatch.stop(part)

    def start_reward(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        embeddings = kwargs["inputs_embeds"]
        # The gradient at the embeddings is what a backward pass ends with, that at the reward what it begins with.
        if embeddings.requires_grad:
            embeddings.register_hook(functools.partial(stop, "reward backward"))
        stopwatch.start("reward forward")

    def stop_reward(module: nn.Module, args: Any, output: Tensor) -> None:
        stopwatch.stop("reward forward")
        if output.requires_grad:
            output.register_hook(functools.partial(start, "reward backward"))

    def measured(part: str, owner: Any, name: str) -> Any:
        function = getattr(owner, name)

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            stopwatch.start(part)
            result = function(*args, **options)
            stopwatch.stop(part)
            return result

        return mock.patch.object(owner, name, call)

    handles = (
        backbone.register_forward_pre_hook(start_reward, with_kwargs=True),
        head.register_forward_hook(stop_reward),
    )
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        # Not by hooks: a model that has some is not captured.
        stack.enter_context(measured("policy forward", type(policy), "forward"))
        stack.enter_context(measured("policy forward", DecodeStep, "_launch"))
        stack.enter_context(measured("policy forward", LaneStep, "_replay"))
        stack.enter_context(measured("kernels", reading, "entropy_topk"))
        stack.enter_context(measured("kernels", segment_decoding, "candidate_scores"))
        yield
