"""Sequences with a common beginning in one model's KV cache, and branches that continue them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from ggro_hf.cache import KeysAndValues, RewindableCache, common_prefix_length
from ggro_hf.models import embedding_rows
from ggro_hf.results import Counters
from ggro_hf.rewards.packing import behind_tails, packing_for, run, takes_tails

# So few tokens of several sequences go through one pass, which computes attention to all tails and masks most of it;
# more of them are worth a pass for each sequence.
_MOST_TOGETHER = 256

# A common beginning gets a pass of its own where that saves more tokens than this; fewer cost less than the pass.
_WORTH_A_PASS = 64


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A sequence beyond the common beginning: its tokens, keys and values; and the hidden state `[d]` at its end."""

    token_ids: list[int]
    layers: KeysAndValues
    last_hidden: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Branches:
    """What became of the branches of equal sequences: each different one once, packed one after another."""

    token_ids: list[list[int]]
    ends: list[int]
    hidden: torch.Tensor
    # None where they still lie in the cache.
    layers: KeysAndValues | None


class CausalTree:
    """The sequences that a model reads for one response; at first one, empty.

    What is in the cache is a constant: nothing here has gradients. Work is added to `counters` as reward tokens.
    """

    def __init__(self, backbone: PreTrainedModel, counters: Counters, capacity: int = 0) -> None:
        self._backbone = backbone
        self._counters = counters
        self._cache = RewindableCache(backbone.config, capacity)
        self._pack = packing_for(backbone)
        self._takes_tails = takes_tails(backbone)
        self._vocabulary = embedding_rows(backbone)
        self._shared: list[int] = []
        self._tails = [_Sequence([], (), torch.empty(0))]
        self._branches: list[_Branches] = []
        # Of every sequence's branches: which of `_branches`, and which there.
        self._places: list[list[tuple[int, int]]] = []

    @property
    def sequences(self) -> list[list[int]]:
        """Token ids of every sequence."""
        return [self._shared + tail.token_ids for tail in self._tails]

    @torch.inference_mode()
    def extend(self, token_ids: list[int]) -> torch.Tensor:
        """Append tokens to the only sequence and return their hidden states `[T, d]`.

        Raises ValueError for a token that the model does not know.
        """
        self._check_known([token_ids])
        self._join(0)
        hidden = run(self._backbone, self._cache, token_ids)
        self._counters.reward_forward_tokens += len(token_ids)
        self._shared = self._shared + token_ids
        self._tails = [_Sequence([], (), hidden[-1])]
        return hidden

    @torch.inference_mode()
    def rewind(self, lengths: Sequence[int]) -> None:
        """Keep of every sequence that many tokens, its first; one that has lost some has no hidden state at its end."""
        shared = min(len(self._shared), *lengths)
        self._cache.rewind(len(self._shared))
        common = self._cache.read(shared, len(self._shared)) if max(lengths) > shared < len(self._shared) else ()
        self._tails = [
            self._shortened(tail, common, shared, length) for tail, length in zip(self._tails, lengths, strict=True)
        ]
        self._cache.rewind(shared)
        self._shared = self._shared[:shared]
        self._branches, self._places = [], []

    def go_to_common(self, inputs: Sequence[Collection[tuple[int, ...]]]) -> torch.Tensor | None:
        """Leave of every sequence what all its inputs, token ids, begin with; one without inputs stays.

        A single sequence gets what else all its inputs begin with, where that saves enough work: its hidden states
        `[T, d]` are returned.
        """
        sequences = self.sequences
        lengths = [
            _common_length([tuple(sequence), *own]) if own else len(sequence)
            for sequence, own in zip(sequences, inputs, strict=True)
        ]
        if lengths != [len(sequence) for sequence in sequences]:
            self.rewind(lengths)
        if len(inputs) > 1 or not inputs[0]:
            return None
        first, *others = inputs[0]
        common = first[lengths[0] : _common_length([first, *others])]
        return self.extend(list(common)) if len(others) * len(common) > _WORTH_A_PASS else None

    @torch.inference_mode()
    def branch(self, branches: Sequence[Sequence[list[int]]]) -> list[list[torch.Tensor]]:
        """Hidden states `[tokens, d]` of branches, a list for every sequence; equal ones of equal
        sequences are computed once, and are the same tensor.

        An empty branch has the hidden state `[1, d]` at the end of its sequence. Raises ValueError unless there is a
        list for every sequence, and for a token that the model does not know.
        """
        if len(branches) != len(self._tails):
            raise ValueError(f"branches has lists for {len(branches)} sequences, but there are {len(self._tails)}")
        self._check_known([branch for own in branches for branch in own])
        groups: dict[tuple[int, ...], int] = {}
        group_of = [groups.setdefault(tuple(tail.token_ids), len(groups)) for tail in self._tails]
        different: list[dict[tuple[int, ...], int]] = [{} for _ in groups]
        for group, own in zip(group_of, branches, strict=True):
            for branch in map(tuple, own):
                different[group].setdefault(branch, len(different[group]))
        self._places = [
            [(group, different[group][tuple(branch)]) for branch in own]
            for group, own in zip(group_of, branches, strict=True)
        ]
        tails = [self._tails[group_of.index(group)] for group in range(len(groups))]
        packed = [[list(branch) for branch in members] for members in different]
        tokens = sum(len(branch) for own in packed for branch in own)
        if len(tails) > 1 and self._takes_tails and 0 < tokens <= _MOST_TOGETHER:
            self._branches = self._pack_together(tails, packed, tokens)
        else:
            self._branches = [self._pack_behind(tail, own) for tail, own in zip(tails, packed, strict=True)]
        self._counters.reward_forward_tokens += tokens
        states = [packed.hidden.tensor_split(packed.ends[:-1]) for packed in self._branches]
        hidden = []
        for tail, own, places in zip(self._tails, branches, self._places, strict=True):
            at_end = tail.last_hidden[None]
            hidden.append(
                [
                    states[group][number] if branch else at_end
                    for branch, (group, number) in zip(own, places, strict=True)
                ]
            )
        return hidden

    @torch.inference_mode()
    def keep(self, chosen: Sequence[tuple[int, int]]) -> None:
        """Go on from branches of the last `branch`, each named by its sequence and its number there.

        Raises ValueError where nothing is chosen.
        """
        if not chosen:
            raise ValueError("chosen must name one branch or more to go on from, got none")
        places = [(self._tails[sequence], *self._places[sequence][branch]) for sequence, branch in chosen]
        if len(places) == 1 and len(self._tails) == 1:
            ((_, group, number),) = places
            self._commit(self._branches[group], number)
        else:
            self._tails = [self._extended(tail, self._branches[group], number) for tail, group, number in places]
            self._cache.rewind(len(self._shared))
            if len(places) == 1:
                self._join(0)
        self._branches, self._places = [], []

    def _check_known(self, branches: list[list[int]]) -> None:
        # On a GPU such a token would be the end of the process.
        largest = max((token for branch in branches for token in branch), default=0)
        if largest >= self._vocabulary:
            raise ValueError(
                f"token {largest} is none of the {self._vocabulary} that the reward model has embeddings for; use a "
                "reward model with the policy's vocabulary, or one that reads text"
            )

    def _pack_behind(self, tail: _Sequence, branches: list[list[int]]) -> _Branches:
        self._cache.rewind(len(self._shared))
        if tail.token_ids:
            self._cache.write(tail.layers)
        length = len(self._shared) + len(tail.token_ids)
        full = [branch for branch in branches if branch]
        ends = list(accumulate(map(len, branches)))
        tokens = ends[-1] if ends else 0
        hidden = self._pack(self._backbone, self._cache, full, length) if full else tail.last_hidden.new_empty(0)
        # The next sequence takes their place.
        layers = self._cache.read(length, length + tokens) if len(self._tails) > 1 and full else None
        return _Branches(branches, ends, hidden, layers)

    def _pack_together(self, tails: list[_Sequence], branches: list[list[list[int]]], tokens: int) -> list[_Branches]:
        """The branches of several sequences in one pass, for which their tails lie in the cache side by side."""
        length = len(self._shared)
        self._cache.rewind(length)
        for tail in tails:
            if tail.token_ids:
                self._cache.write(tail.layers)
        lengths = [len(tail.token_ids) for tail in tails]
        hidden = behind_tails(self._backbone, self._cache, branches, length, lengths)
        start = length + sum(lengths)
        layers = self._cache.read(start, start + tokens)
        packed, first = [], 0
        for own in branches:
            ends = list(accumulate(map(len, own)))
            last = first + (ends[-1] if ends else 0)
            packed.append(_Branches(own, ends, hidden[first:last], _between(layers, first, last)))
            first = last
        return packed

    def _shortened(self, tail: _Sequence, common: KeysAndValues, shared: int, length: int) -> _Sequence:
        """Of the first `length` tokens of a sequence those beyond the first `shared`; `common` is what leaves these."""
        ids = (self._shared + tail.token_ids)[shared:length]
        whole = length == len(self._shared) + len(tail.token_ids)
        hidden = tail.last_hidden if whole else torch.full_like(tail.last_hidden, torch.nan)
        if not ids:
            return _Sequence([], (), hidden)
        layers = _joined(common, tail.layers) if common and tail.token_ids else common or tail.layers
        return _Sequence(ids, _between(layers, 0, len(ids)), hidden)

    def _commit(self, packed: _Branches, number: int) -> None:
        """The only sequence with one of its branches."""
        token_ids, end = packed.token_ids[number], packed.ends[number]
        length = len(self._shared)
        self._cache.keep_branch(length, length + end - len(token_ids), length + end)
        if token_ids:
            self._shared = self._shared + token_ids
            self._tails = [_Sequence([], (), packed.hidden[end - 1])]

    def _extended(self, tail: _Sequence, packed: _Branches, number: int) -> _Sequence:
        token_ids, end = packed.token_ids[number], packed.ends[number]
        if not token_ids:
            return tail
        start = end - len(token_ids)
        if packed.layers is None:
            length = len(self._shared)
            layers = self._cache.read(length + start, length + end)
        else:
            layers = _between(packed.layers, start, end)
        if tail.token_ids:
            layers = _joined(tail.layers, layers)
        return _Sequence(tail.token_ids + token_ids, layers, packed.hidden[end - 1])

    def _join(self, sequence: int) -> None:
        """Make one sequence the only one, and all of it the common beginning."""
        tail = self._tails[sequence]
        self._cache.rewind(len(self._shared))
        if tail.token_ids:
            self._cache.write(tail.layers)
            self._shared = self._shared + tail.token_ids
        self._tails = [_Sequence([], (), tail.last_hidden)]


def _common_length(sequences: list[tuple[int, ...]]) -> int:
    # What the first and the last in lexicographic order share, all share.
    return common_prefix_length(list(min(sequences)), list(max(sequences)))


def _between(layers: KeysAndValues, start: int, end: int) -> KeysAndValues:
    return tuple((keys[:, :, start:end], values[:, :, start:end]) for keys, values in layers)


def _joined(first: KeysAndValues, second: KeysAndValues) -> KeysAndValues:
    return tuple(
        (torch.cat([before[0], after[0]], dim=2), torch.cat([before[1], after[1]], dim=2))
        for before, after in zip(first, second, strict=True)
    )
