"""Causal reward models that read text: another tokenizer than the policy's, or a template that closes the turn."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.cache import common_prefix_length
from ggro_hf.models import TOLERANCE, context_length, embedding_rows
from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.formats import Format, default_format
from ggro_hf.rewards.loading import load_classifier, require_tokenizer
from ggro_hf.rewards.packing import one_by_one, packing_for
from ggro_hf.rewards.responses import PromptInputs, Responses
from ggro_hf.rewards.tree import CausalTree

Readout = Callable[[torch.Tensor], torch.Tensor]
"""From hidden states [n, d] to rewards [n]."""

# A common beginning gets a pass of its own where that saves more tokens than this; fewer cost less than the pass.
_WORTH_A_PASS = 64

# Tokens of the self-check at load, split into a cached prefix and a branch.
_CHECK_PREFIX, _CHECK_BRANCH = 5, 4


class TextReward(Reward):
    """A scalar head on a causal backbone that reads prompt and response as text, in its own tokens.

    Every response is written by `format`, by default the tokenizer's chat template with the turn closed, and tokenised
    as a whole, since more text can change the tokens before it. What inputs have in common with each other and with
    what is cached goes through the model once; the rest are branches. `head` reads the hidden state of the last token,
    by default it is the model's linear `score`. The parameters are frozen (`requires_grad_(False)`).

    Raises ValueError where the model is no causal backbone, where without `head` it has no scalar `score`, or where its
    branches do not agree with its plain forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        head: Readout | None = None,
        format: Format | None = None,
    ) -> None:
        if model.config.is_encoder_decoder:
            raise ValueError(f"reward model is a {type(model).__name__}, which is no causal backbone with a head")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.head = head or _linear_score(model)
        self.format = format or default_format(tokenizer)
        self._check_parity()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        format: Format | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Load a classifier with one label from a directory or a hub id; raises what `load_classifier` does too."""
        model, tokenizer = load_classifier(
            name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, revision=revision
        )
        return cls(model, require_tokenizer(tokenizer, name), format=format)

    @property
    def capabilities(self) -> Capabilities:
        tree = packing_for(self.model.base_model) is not one_by_one
        return Capabilities(
            reads_ids=False, cached_prefix=True, tree=tree, gradient=False, max_tokens=context_length(self.model)
        )

    def open(self, conversation: Conversation, counters: Counters, max_new_tokens: int) -> Scoring:
        """As `Reward.open`; a response that is too long is found when it is scored."""
        inputs = PromptInputs(self.format, self.tokenizer, conversation, self.capabilities.max_tokens)
        tree = CausalTree(self.model.base_model, counters, capacity=inputs.prompt_tokens + max_new_tokens)
        return _TextScoring(tree, self.head, inputs, Responses(conversation))

    def _check_parity(self) -> None:
        """Compare branches with a plain forward, once, at load."""
        if self.model.device.type == "meta":
            return
        backbone = self.model.base_model
        rows = embedding_rows(backbone)
        ids = [(7 * i + 1) % rows for i in range(_CHECK_PREFIX + _CHECK_BRANCH)]
        tree = CausalTree(backbone, Counters())
        tree.extend(ids[:_CHECK_PREFIX])
        (branches,) = tree.branch([[ids[_CHECK_PREFIX:], ids[1:]]])
        with torch.inference_mode():
            plain = backbone(input_ids=torch.tensor([ids], device=self.model.device)).last_hidden_state[0, -1]
            rewards = _read(self.head, [plain, branches[0][-1]])
        tolerance = TOLERANCE[self.model.dtype] * max(1.0, abs(rewards[0]))
        if not abs(rewards[0] - rewards[1]) <= tolerance:
            raise ValueError(
                f"reward model {type(self.model).__name__} answers {rewards[0]:.6g} in one pass and {rewards[1]:.6g} "
                f"behind a cached prefix (tolerance {tolerance:.1g}): its backbone is not causal or its weights are "
                "not finite"
            )


class _TextScoring(Scoring):
    """Sequences of the tree are inputs of the model as far as they are known, the closed turn included."""

    def __init__(self, tree: CausalTree, head: Readout, inputs: PromptInputs, responses: Responses) -> None:
        self._tree = tree
        self._head = head
        self._inputs = inputs
        self._responses = responses
        self._known: dict[tuple[int, ...], float] = {}
        self._ids: list[list[tuple[int, ...]]] = []
        # Where in the tree's last branches an input is; None after a choice.
        self._branches: dict[tuple[int, ...], tuple[int, int]] | None = None

    def score(self, continuations: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        self._ids = self._tokenize(self._responses.extend(continuations))
        new: set[tuple[int, ...]] = set()
        rows = []
        for row in self._ids:
            rows.append([ids for ids in dict.fromkeys(row) if ids not in self._known and ids not in new])
            new.update(rows[-1])
        if self._branches is None or new:
            self._branches = self._compute(rows)
        return [[self._known[ids] for ids in row] for row in self._ids]

    def keep(self, chosen: Sequence[tuple[int, int]]) -> None:
        assert self._branches is not None
        self._responses.keep(chosen)
        kept = [self._ids[sequence][continuation] for sequence, continuation in chosen]
        branches = self._branches
        self._tree.keep([branches.get(ids, (sequence, -1)) for ids, (sequence, _) in zip(kept, chosen, strict=True)])
        self._known = {ids: self._known[ids] for ids in kept}
        self._branches = None

    def _compute(self, rows: list[list[tuple[int, ...]]]) -> dict[tuple[int, ...], tuple[int, int]]:
        """Add the rewards of new inputs to those known; return the branch of each."""
        bases = self._go_to_bases(rows)
        hidden = self._tree.branch(
            # The empty branch, the last, is the sequence itself, for inputs that are known.
            [[*(list(ids[base:]) for ids in row), []] for row, base in zip(rows, bases, strict=True)]
        )
        branches = {ids: (sequence, i) for sequence, row in enumerate(rows) for i, ids in enumerate(row)}
        last = [hidden[sequence][i][-1] for sequence, i in branches.values()]
        self._known.update(zip(branches, _read(self._head, last), strict=True))
        return branches

    def _tokenize(self, texts: list[list[str]]) -> list[list[tuple[int, ...]]]:
        places: dict[str, tuple[int, int]] = {}
        for sequence, row in enumerate(texts):
            for continuation, text in enumerate(row):
                places.setdefault(text, (sequence, continuation))
        if not places:
            return [[] for _ in texts]
        encoded = self._inputs.encode(list(places), list(places.values()))["input_ids"]
        ids = dict(zip(places, map(tuple, encoded), strict=True))
        return [[ids[text] for text in row] for row in texts]

    def _go_to_bases(self, rows: list[list[tuple[int, ...]]]) -> list[int]:
        """Leave in the tree what new inputs share with its sequences; return how many tokens that is for each."""
        sequences = self._tree.sequences
        bases = [
            min(_common_prefix([tuple(sequence), *row]), *(len(ids) - 1 for ids in row)) if row else len(sequence)
            for sequence, row in zip(sequences, rows, strict=True)
        ]
        if bases != [len(sequence) for sequence in sequences]:
            self._tree.rewind(bases)
        if len(rows) == 1 and len(rows[0]) > 1:
            (row,) = rows
            shared = min(_common_prefix(row), *(len(ids) - 1 for ids in row))
            if (len(row) - 1) * (shared - bases[0]) > _WORTH_A_PASS:
                self._tree.extend(list(row[0][bases[0] : shared]))
                bases = [shared]
        return bases


def _common_prefix(rows: list[tuple[int, ...]]) -> int:
    # What the first and the last in lexicographic order share, all share.
    return common_prefix_length(list(min(rows)), list(max(rows)))


def _read(head: Readout, hidden: list[torch.Tensor]) -> list[float]:
    if not hidden:
        return []
    with torch.inference_mode():
        rewards = head(torch.stack(hidden))
    if rewards.shape != (len(hidden),):
        raise ValueError(
            f"head returned the shape {list(rewards.shape)} for {len(hidden)} hidden states; return one reward for each"
        )
    return rewards.double().tolist()


def _linear_score(model: PreTrainedModel) -> Readout:
    score = getattr(model, "score", None)
    if not isinstance(score, torch.nn.Linear) or score.out_features != 1:
        raise ValueError(
            f"reward model {type(model).__name__} has no linear `score` head for one number; pass head=... for "
            "another head, or use EncoderReward for an encoder"
        )
    return lambda hidden: score(hidden)[:, 0]
