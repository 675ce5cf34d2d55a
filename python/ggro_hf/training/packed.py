"""Token ids that a causal model reads in one pass: a sequence, and branches that leave it and end by themselves."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ggro_hf.cache import RewindableCache, common_prefix_length
from ggro_hf.models import device_of, disagreement, embedding_rows

Input = dict[str, list[int]]

# The self-check: a sequence, and others that share so many of its tokens.
_CHECK_TOKENS = 12
_CHECK_SHARED = (3, 8)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BranchMasks:
    """What a model's attention takes as a mask: one for each sliding window that layers have (None: no window), to be
    added to the scores or, if not `additive`, True where a token sees.
    """

    windows: frozenset[int | None]
    additive: bool


class PackedInput:
    """One row of a batch: the longest sequence, and for others what they do not share with it.

    Partial responses whose turn is closed are such others: each has a few tokens of its own behind what it shares.
    """

    def __init__(self, token_ids: list[int]) -> None:
        self._trunk = token_ids
        self._packed = list(token_ids)
        self._positions = list(range(len(token_ids)))
        self._starts = [0] * len(token_ids)
        # Where each sequence with tokens of its own ends.
        self._ends: dict[tuple[int, ...], int] = {}

    def find(self, token_ids: list[int]) -> int | None:
        """Where a sequence ends that is in it already."""
        if self._trunk[: len(token_ids)] == token_ids:
            return len(token_ids) - 1
        return self._ends.get(tuple(token_ids))

    def branch(self, token_ids: list[int]) -> int | None:
        """Add a sequence and say where it ends; None where it shares less than half with the longest."""
        shared = common_prefix_length(self._trunk, token_ids)
        if 2 * shared < len(token_ids):
            return None
        start = len(self._packed)
        self._packed += token_ids[shared:]
        self._positions += range(shared, len(token_ids))
        self._starts += [start] * (len(token_ids) - shared)
        self._ends[tuple(token_ids)] = len(self._packed) - 1
        return len(self._packed) - 1

    def encoded(self) -> Input:
        """Token ids; with branches also the position of every token, and where in the row its branch starts."""
        if not self._ends:
            return {"input_ids": self._packed}
        return {"input_ids": self._packed, "position_ids": self._positions, "branch_starts": self._starts}


def packed_batch(inputs: Sequence[Input], masks: BranchMasks) -> dict[str, Any]:
    """A batch of packed rows, padded on the right: `input_ids` and `position_ids` `[rows, T]`, and the mask.

    A token sees those of its own branch up to itself, and of the sequence that it leaves those at smaller positions
    than its branch's first. The mask is `[rows, 1, T, T]`; where layers have different windows, there is one for each
    of transformers' two kinds.
    """
    width = max(len(row["input_ids"]) for row in inputs)
    ids, positions, starts = (torch.zeros(len(inputs), width, dtype=torch.int64) for _ in range(3))
    for row, encoded in enumerate(inputs):
        length = len(encoded["input_ids"])
        ids[row, :length] = torch.tensor(encoded["input_ids"])
        positions[row, :length] = torch.tensor(encoded.get("position_ids", range(length)))
        starts[row, :length] = torch.tensor(encoded.get("branch_starts", [0] * length))
    index = torch.arange(width)
    left = positions.gather(1, starts)
    own = (index >= starts[..., None]) & (index <= index[:, None])
    sees = own | (index < left[..., None])
    of_kinds = {}
    for window in masks.windows:
        near = sees if window is None else sees & (positions[:, None] > positions[..., None] - window)
        mask = torch.zeros(near.shape).masked_fill(~near, torch.finfo(torch.float32).min) if masks.additive else near
        of_kinds["full_attention" if window is None else "sliding_attention"] = mask[:, None]
    # Models whose layers are all alike take the mask itself.
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": of_kinds if len(of_kinds) > 1 else next(iter(of_kinds.values())),
    }


def is_computable(model: PreTrainedModel) -> bool:
    """Whether a forward pass of the model alone is possible: its weights are there, and whole (not ZeRO's)."""
    return device_of(model).type != "meta" and not is_deepspeed_zero3_enabled()


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of before returns."""
    mode = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(mode)


def branch_masks_of(model: PreTrainedModel) -> BranchMasks | None:
    """The masks with which a causal classifier gives branches the hidden states of separate passes; None without any.

    Compared on a few tokens, since models differ in what they make of a mask. Weights that are spread over processes
    cannot be: they get none.
    """
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        return None
    masks = BranchMasks(frozenset(RewindableCache(model.config).windows), additive=implementation == "eager")
    if device_of(model).type == "meta":
        return masks
    if not is_computable(model):
        return None
    rows = embedding_rows(model)
    ids = [(7 * token + 1) % rows for token in range(_CHECK_TOKENS)]
    sequences = [ids, *([*ids[:shared], (5 * shared) % rows, 3 % rows] for shared in _CHECK_SHARED)]
    packed = PackedInput(ids)
    ends = [packed.find(sequence) or packed.branch(sequence) for sequence in sequences]
    backbone: Any = model.base_model

    def states(batch: dict[str, Any]) -> torch.Tensor:
        hidden: torch.Tensor = backbone(**batch, use_cache=False).last_hidden_state
        return hidden[0]

    with evaluating(model):
        device = device_of(model)
        expected = [states({"input_ids": torch.tensor([sequence], device=device)})[-1] for sequence in sequences]
        reason = disagreement(
            "hidden states",
            lambda: states(to_device_of(model, packed_batch([packed.encoded()], masks)))[ends],
            torch.stack(expected),
            model.dtype,
        )
    if reason is not None:
        _logger.info("%s reads partial responses with tokens of their own one by one: %s", type(model).__name__, reason)
        return None
    return masks


def to_device_of(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch where the model takes its token ids."""
    device = device_of(model)
    return {
        name: {kind: mask.to(device) for kind, mask in value.items()} if isinstance(value, dict) else value.to(device)
        for name, value in batch.items()
    }
