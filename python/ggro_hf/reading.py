"""What a decoder keeps of the policy's logits: computed where they are, read by the host in one transfer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ggro_kernels import EntropyTopK, entropy_topk

# `entropy_topk` selects up to this many; more candidates than that are a full sort.
_LARGEST_KERNEL_K = 256

T = TypeVar("T")


class Reader(ABC, Generic[T]):
    """A way to read one row of logits `[V]`; readers that are equal read the same."""

    @abstractmethod
    def on_device(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tensors whose shapes depend on that of the logits alone, without waiting for the device.

        The first has the ids `[k]` int64 of the likeliest tokens in order, k at least 1.
        """

    @abstractmethod
    def on_host(self, *tensors: torch.Tensor) -> T:
        """What the decoder gets of these tensors, then on the CPU."""


@dataclass(frozen=True, slots=True)
class Position:
    """What is kept of one row of logits: entropy (nats), logsumexp, and the likeliest tokens in order."""

    entropy: float
    logsumexp: float
    tokens: list[int]
    logits: list[float]

    def log_probability(self, token: int) -> float:
        """Log-probability of one of `tokens`."""
        return self.logits[self.tokens.index(token)] - self.logsumexp


@dataclass(frozen=True)
class TopK(Reader[Position]):
    """Entropy and the `k` likeliest tokens in one pass.

    Reading raises FloatingPointError where the logits hold NaN or +inf, or nothing finite.
    """

    k: int

    def on_device(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        indices, logsumexp, entropy, values = self.rows_on_device(logits[None])
        return indices[0], logsumexp, entropy, values[0]

    def rows_on_device(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`on_device` of every row of logits `[R, V]`."""
        top = likeliest(logits, self.k)
        return top.indices, top.logsumexp, top.entropy, top.values

    def on_host(self, *tensors: torch.Tensor) -> Position:
        tokens, logsumexp, entropy, values = tensors
        return Position(checked_entropy(entropy.item()), logsumexp.item(), tokens.tolist(), values.tolist())


def likeliest(logits: torch.Tensor, k: int) -> EntropyTopK:
    """`entropy_topk` of logits `[R, V]` for any k; all tokens in order where k is larger than V."""
    top = entropy_topk(logits, min(k, _LARGEST_KERNEL_K, logits.shape[1]))
    if k <= _LARGEST_KERNEL_K:
        return top
    values, indices = (ordered[:, :k] for ordered in logits.sort(descending=True, stable=True))
    return top._replace(values=values, indices=indices)


def checked_entropy(entropy: float) -> float:
    """Raise FloatingPointError for the entropy of logits that hold NaN or +inf, or nothing finite."""
    if entropy != entropy:
        raise FloatingPointError(
            "the policy's logits hold NaN, +inf or no finite value; its weights or its dtype cannot carry this input "
            "(try dtype=torch.float32)"
        )
    return entropy
