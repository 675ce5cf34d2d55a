"""SP-PRM on plain transformers, as its released code does it: every partial response is a row of its own."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ggro_hf.training.weights import WeighedPair

# The released code's batch on a device: four comparisons, chosen and rejected in turn.
_COMPARISONS = 4


@dataclass(frozen=True)
class Comparison:
    """The inputs of a chosen and a rejected partial response; `place` is the comparison's number in the data."""

    place: int
    chosen: dict[str, list[int]]
    rejected: dict[str, list[int]]
    weight: float

    @property
    def length(self) -> int:
        """Of the longer input."""
        return max(len(self.chosen["input_ids"]), len(self.rejected["input_ids"]))


def comparisons_of(
    pairs: Sequence[WeighedPair], tokenizer: PreTrainedTokenizerBase, *, causal: bool, closed: bool = False
) -> list[Comparison]:
    """All comparisons of the pairs. A causal model reads open turns, finished responses closed by end-of-sequence;
    `closed`, all of them.
    """
    comparisons: list[Comparison] = []
    for weighed in pairs:
        pair = weighed.partial.pair
        for length, weight in zip(weighed.partial.lengths, weighed.weights, strict=True):
            chosen, rejected = (
                _encode(tokenizer, str(pair.prompt), response, length, causal, closed)
                for response in (pair.chosen, pair.rejected)
            )
            comparisons.append(Comparison(len(comparisons), chosen, rejected, weight))
    return comparisons


def shuffled(comparisons: Sequence[Comparison], seed: int = 0) -> list[Comparison]:
    """In a drawn order, as a training epoch takes its rows."""
    return random.Random(seed).sample(comparisons, len(comparisons))


def by_length(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Those of similar length together, so that little is padded."""
    return sorted(comparisons, key=lambda comparison: comparison.length)


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, comparisons: Sequence[Comparison]) -> float:
    """The mean loss of all comparisons; accumulates its gradient over batches of eight rows."""
    total = 0.0
    for batch, rewards in _passes(model, tokenizer, comparisons):
        weights = torch.tensor([comparison.weight for comparison in batch])
        loss = -(weights * logsigmoid(rewards[0::2] - rewards[1::2])).sum() / len(comparisons)
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, comparisons: Sequence[Comparison]
) -> list[tuple[float, float]]:
    """Rewards of chosen and rejected of every comparison, in the order of the data."""
    rewards: dict[int, tuple[float, float]] = {}
    for batch, values in _passes(model, tokenizer, comparisons):
        for comparison, chosen, rejected in zip(batch, values[0::2].tolist(), values[1::2].tolist(), strict=True):
            rewards[comparison.place] = (chosen, rejected)
    return [rewards[place] for place in sorted(rewards)]


def _passes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, comparisons: Sequence[Comparison]
) -> Iterator[tuple[Sequence[Comparison], torch.Tensor]]:
    """Batches and the rewards of their rows."""
    classifier: Any = model
    for first in range(0, len(comparisons), _COMPARISONS):
        batch = comparisons[first : first + _COMPARISONS]
        rows = [row for comparison in batch for row in (comparison.chosen, comparison.rejected)]
        yield batch, classifier(**tokenizer.pad(rows, padding_side="right", return_tensors="pt")).logits[:, 0]


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, length: int | None, causal: bool, closed: bool
) -> dict[str, list[int]]:
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    if not causal:
        return dict(tokenizer(prompt, response if length is None else tokenizer.decode(ids[:length])))
    end = [tokenizer.eos_token_id] if length is None or closed else []
    row = tokenizer(prompt)["input_ids"] + ids[:length] + end
    return {"input_ids": row, "attention_mask": [1] * len(row)}
