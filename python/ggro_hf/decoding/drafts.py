"""Continuations of one sequence drawn side by side, each by random numbers of its own."""

import math
from dataclasses import dataclass

import numpy as np

from ggro_hf.cache import Branch
from ggro_hf.decoding.drawing import Distribution, Warped
from ggro_hf.policy import Policy

# An entropy stop needs this many tokens before it.
_TOKENS_BEFORE_STOP = 4


@dataclass(frozen=True, slots=True)
class DraftRules:
    """Where a draft ends: with an end-of-sequence id, at a length, or before a token of high entropy (nats)."""

    eos_ids: frozenset[int]
    max_tokens: int
    entropy_threshold: float = math.inf


@dataclass(eq=False, slots=True)
class Draft:
    """One drawn continuation.

    Where it ended before a token of high entropy, `boundary` is what that would be drawn from.
    """

    token_ids: list[int]
    entropies: list[float]
    boundary: Distribution | None = None
    boundary_entropy: float | None = None
    # The tokens that the policy has computed: without the last, unless there is a boundary.
    branch: Branch | None = None


def draw_drafts(
    policy: Policy[Distribution],
    reader: Warped,
    numbers: list[np.random.Generator],
    rules: DraftRules,
    *,
    keep: bool = False,
) -> list[Draft]:
    """One draft for each source of numbers, from the policy's position on, a pass for all of them at each token.

    With `keep` they can be given to `continue_from`. The policy stays where it is.
    """
    drafts = [Draft([], []) for _ in numbers]
    rows = policy.fork(len(drafts))
    position = policy.position.rows([0] * len(drafts))
    live = list(range(len(drafts)))
    for step in range(rules.max_tokens):
        tokens, entropies = position.draw(np.array([numbers[index].random() for index in live]))
        going = []
        for row, (index, token, entropy) in enumerate(zip(live, tokens, entropies, strict=True)):
            draft = drafts[index]
            uncertain = step >= _TOKENS_BEFORE_STOP and entropy >= rules.entropy_threshold
            if uncertain:
                draft.boundary, draft.boundary_entropy = position.rows([row]), entropy
            else:
                draft.token_ids.append(token)
                draft.entropies.append(entropy)
            if not uncertain and token not in rules.eos_ids and step + 1 < rules.max_tokens:
                going.append(row)
            elif keep:
                draft.branch = Branch(draft.token_ids[:step], rows.read(row))
        if not going:
            break
        rows.select(going)
        live = [live[row] for row in going]
        position = reader.read(rows.extend([drafts[index].token_ids[-1] for index in live]))
    return drafts


def continue_from(policy: Policy[Distribution], draft: Draft) -> None:
    """Make a kept draft part of the policy's sequence."""
    assert draft.branch is not None
    policy.restore(draft.branch)
    if draft.boundary is not None:
        policy.position = draft.boundary
    else:
        policy.extend(draft.token_ids[-1:])
