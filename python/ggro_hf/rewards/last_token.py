"""Rewards that a head reads at the last token of what the policy has written, in the policy's own ids."""

from collections.abc import Sequence

import torch

from ggro_hf.rewards.base import Scoring
from ggro_hf.rewards.heads import Readout
from ggro_hf.rewards.tree import CausalTree


class LastTokenScoring(Scoring):
    """Every continuation is a branch, read at its last token; the turn is left open."""

    def __init__(self, tree: CausalTree, readout: Readout) -> None:
        self._tree = tree
        self._readout = readout

    @torch.inference_mode()
    def score(self, continuations: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        hidden = self._tree.branch(continuations)
        # Equal continuations are the same tensor. As rows of a matrix product they could be rounded differently.
        last = {id(states): states[-1] for branches in hidden for states in branches}
        values = self._readout(torch.stack(list(last.values()))).tolist() if last else []
        rewards = dict(zip(last, values, strict=True))
        return [[rewards[id(states)] for states in branches] for branches in hidden]

    def keep(self, chosen: Sequence[tuple[int, int]]) -> None:
        self._tree.keep(chosen)
