"""Tokens drawn from the policy by numbers that depend on the seed, the row and the draw, and on nothing else."""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ggro_hf.decoding.guided import best_index
from ggro_hf.reading import Reader, checked_entropy, likeliest
from ggro_hf.transfer import to_device, to_host

# A number of the generator's counter that no other purpose uses: see `uniforms`.
DRAWING, ACCEPTING = 0, 1


def uniforms(seed: int, row: int, *draw: int, purpose: int = DRAWING) -> np.random.Generator:
    """Random numbers of one draw (up to two numbers name it) of one row: counter-based, so no other draw moves them."""
    key = np.array([seed % 2**64, row], dtype=np.uint64)
    counter = np.array([0, purpose, *draw, *[0] * (2 - len(draw))], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True, slots=True)
class Distribution:
    """What to draw from in each of R rows.

    `entropy` [R] (nats) is the policy's before warping. `probabilities` [R, n] belong to `tokens` [R, n], to all ids in
    order where that is None.
    """

    entropy: torch.Tensor
    tokens: torch.Tensor | None
    probabilities: torch.Tensor

    def rows(self, rows: list[int]) -> "Distribution":
        """Some of the rows; a row may be repeated."""
        index = to_device([rows], self.entropy.device)[0]
        tokens = None if self.tokens is None else self.tokens[index]
        return Distribution(self.entropy[index], tokens, self.probabilities[index])

    def draw(self, numbers: np.ndarray) -> tuple[list[int], list[float]]:
        """The token at each row's number in [0, 1) by the inverse of its cumulative distribution, and its entropy.

        Raises FloatingPointError where the policy's logits were not numbers.
        """
        cumulative = self.probabilities.double().cumsum(-1)
        total = cumulative[:, -1:]
        at = torch.from_numpy(numbers)[:, None].to(total.device, non_blocking=True) * total
        # Rounding must not reach the total, behind which there is no token.
        at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
        place = torch.searchsorted(cumulative, at, right=True).clamp(max=cumulative.shape[1] - 1)
        chosen = place if self.tokens is None else self.tokens.gather(1, place)
        entropy, chosen = to_host(self.entropy, chosen[:, 0])
        for value in entropy.tolist():
            checked_entropy(value)
        return chosen.tolist(), entropy.tolist()


@dataclass(frozen=True)
class Warped(Reader[Distribution]):
    """Reads what temperature, then top-k, then top-p make of the policy; `None` leaves one out.

    A temperature of 0 leaves the likeliest token. Of equal logits at the top-k cut the lowest ids are taken. Raises
    ValueError for settings out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, but must be a finite number, at least 0")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but must be from 0 to 1, or None for all tokens")
        # The warpers of transformers check the others.
        self._warpers()

    def read(self, logits: torch.Tensor) -> Distribution:
        """What to draw from after logits `[R, V]`, without waiting for the device."""
        return self._distribution(*self._statistics(logits))

    def on_device(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        indices, *others = self._statistics(logits[None])
        return indices[0], *others

    def on_host(self, *tensors: torch.Tensor) -> Distribution:
        indices, *others = tensors
        return self._distribution(indices[None], *others)

    @property
    def _kept(self) -> int | None:
        """Number of likeliest tokens that all candidates are among; None for all tokens."""
        return 1 if self.temperature == 0 else self.top_k

    def _statistics(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kept = self._kept
        top = likeliest(logits, 1 if kept is None else kept)
        scores = logits if kept is None else top.values
        # The warpers used here look at scores only.
        no_context = cast(torch.LongTensor, torch.empty((len(logits), 0), dtype=torch.long, device=logits.device))
        scores = self._warpers()(no_context, cast(torch.FloatTensor, scores.float()))
        return top.indices, top.entropy, torch.softmax(scores, dim=-1)

    def _distribution(self, indices: torch.Tensor, entropy: torch.Tensor, probabilities: torch.Tensor) -> Distribution:
        return Distribution(entropy, None if self._kept is None else indices, probabilities)

    def _warpers(self) -> LogitsProcessorList:
        warpers = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        return warpers


def draw_by_score(scores: list[float], temperature: float, number: float) -> int:
    """Index drawn from `softmax(scores / temperature)` by a number in [0, 1), in index order and fp64; NaN never wins.

    Raises FloatingPointError if all are NaN.
    """
    best = scores[best_index(scores)]
    if not np.isfinite(best):
        return best_index(scores)
    weights = np.nan_to_num(np.exp((np.array(scores, dtype=np.float64) - best) / temperature), nan=0.0)
    cumulative = weights.cumsum()
    at = min(number * cumulative[-1], np.nextafter(cumulative[-1], 0.0))
    return int(np.searchsorted(cumulative, at, side="right"))
