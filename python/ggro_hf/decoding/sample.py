"""Ancestral sampling with temperature, top-k and top-p."""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from ggro_hf.decoding.base import Decoder, Request, checked_entropy, finish_reason, open_policy
from ggro_hf.policy import Policy
from ggro_hf.results import Counters, Generation, Trace
from ggro_hf.transfer import to_host
from ggro_kernels import entropy_topk


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
        self.warpers = sampling_warpers(temperature, top_k, top_p)
        self.seed = seed

    def _decode(self, request: Request, counters: Counters) -> Generation:
        policy = open_policy(request, counters)
        generator = row_generator(self.seed, request.row)
        with counters.phase("decode"):
            token_ids, entropies = draw_response(policy, request, self.warpers, generator, on_tokens=self._stream)
        reason = finish_reason(token_ids, request)
        return Generation(request.prompt_ids, token_ids, reason, None, Trace(entropies), counters)


def sampling_warpers(temperature: float, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    """The warpers of `transformers` for these settings; `None` leaves one out. They check their own ranges."""
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(float(top_p)))
    return warpers


def row_generator(seed: int, row: int) -> torch.Generator:
    """Random numbers of one row; on the CPU, so that draws are the same on every device."""
    # The generator's own seed has 32 bits; SeedSequence mixes both numbers into them.
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, row)).generate_state(1)[0]))


def draw_response(
    policy: Policy,
    request: Request,
    warpers: LogitsProcessorList,
    generator: torch.Generator,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> tuple[list[int], list[float]]:
    """Draw one response after the sequence in `policy`; its tokens and their entropies (nats, before warping)."""
    # The warpers used here look at scores only.
    no_context = cast(torch.LongTensor, torch.empty((1, 0), dtype=torch.long, device=policy.logits.device))
    token_ids: list[int] = []
    entropies: list[float] = []
    logits = policy.logits
    while True:
        scores = warpers(no_context, cast(torch.FloatTensor, logits[None].float()))
        entropy, probabilities = to_host(entropy_topk(logits[None], 1).entropy, torch.softmax(scores, dim=-1))
        entropies.append(checked_entropy(entropy.item()))
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        token_ids.append(token)
        if on_tokens is not None:
            on_tokens([token])
        if token in request.eos_ids or len(token_ids) == request.max_new_tokens:
            return token_ids, entropies
        logits = policy.extend([token])
