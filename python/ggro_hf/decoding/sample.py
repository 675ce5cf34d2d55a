"""Ancestral sampling with temperature, top-k and top-p."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from ggro_hf.decoding.base import Decoder, Request, finish_reason, open_policy
from ggro_hf.policy import Policy
from ggro_hf.reading import Reader, checked_entropy
from ggro_hf.results import Counters, Generation, Trace
from ggro_kernels import entropy_topk


@dataclass(frozen=True, slots=True)
class Distribution:
    """The policy's entropy (nats, before warping), and the probabilities `[1, V]` to draw from."""

    entropy: float
    probabilities: torch.Tensor


@dataclass(frozen=True)
class Warped(Reader[Distribution]):
    """Reads what temperature, top-k and top-p make of the policy; `None` leaves one out."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        # The warpers check their own ranges.
        self.warpers()

    def warpers(self) -> LogitsProcessorList:
        """Those of `transformers` for these settings."""
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        return warpers

    def on_device(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        top = entropy_topk(logits[None], 1)
        # The warpers used here look at scores only.
        no_context = cast(torch.LongTensor, torch.empty((1, 0), dtype=torch.long, device=logits.device))
        scores = self.warpers()(no_context, cast(torch.FloatTensor, logits[None].float()))
        return top.indices[0], top.entropy, torch.softmax(scores, dim=-1)

    def on_host(self, *tensors: torch.Tensor) -> Distribution:
        _, entropy, probabilities = tensors
        return Distribution(checked_entropy(entropy.item()), probabilities)


class Sample(Decoder):
    """Tokens drawn from the policy: temperature, then top-k, then top-p.

    The draws of a row depend on `seed` and the row's number alone, not on the batch or the device. Raises ValueError
    for settings out of range.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(streamer=streamer)
        self.reader = Warped(temperature, top_k, top_p)
        self.seed = seed

    def _decode(self, request: Request, counters: Counters) -> Generation:
        policy = open_policy(request, counters, self.reader)
        generator = row_generator(self.seed, request.row)
        with counters.phase("decode"):
            token_ids, entropies = draw_response(policy, request, generator, on_tokens=self._stream)
        reason = finish_reason(token_ids, request)
        return Generation(request.prompt_ids, token_ids, reason, None, Trace(entropies), counters)


def row_generator(seed: int, row: int) -> torch.Generator:
    """Random numbers of one row; on the CPU, so that draws are the same on every device."""
    # The generator's own seed has 32 bits; SeedSequence mixes both numbers into them.
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, row)).generate_state(1)[0]))


def draw_response(
    policy: Policy[Distribution],
    request: Request,
    generator: torch.Generator,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> tuple[list[int], list[float]]:
    """Draw one response from the policy's position on; its tokens and their entropies (nats, before warping)."""
    token_ids: list[int] = []
    entropies: list[float] = []
    while True:
        entropies.append(policy.position.entropy)
        token = int(torch.multinomial(policy.position.probabilities, 1, generator=generator))
        token_ids.append(token)
        if on_tokens is not None:
            on_tokens([token])
        if token in request.eos_ids or len(token_ids) == request.max_new_tokens:
            return token_ids, entropies
        policy.extend([token])
