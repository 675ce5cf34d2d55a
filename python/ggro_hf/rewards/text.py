"""Causal reward models that read text: another tokenizer than the policy's, or a template that closes the turn."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.models import context_length
from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.formats import Format, default_format
from ggro_hf.rewards.heads import Head, Readout
from ggro_hf.rewards.loading import load_classifier, require_tokenizer
from ggro_hf.rewards.packing import one_by_one, packing_for
from ggro_hf.rewards.responses import PromptInputs, Responses
from ggro_hf.rewards.tree import CausalTree


class TextReward(Reward):
    """A scalar head on a causal backbone that reads prompt and response as text, in its own tokens.

    Every response is written by `format`, by default the tokenizer's chat template with the turn closed, and tokenised
    as a whole, since more text can change the tokens before it. What inputs have in common with each other and with
    what is cached goes through the model once; the rest are branches. `head` reads the hidden state of the last token,
    by default it is the model's linear `score`; one of the registry finds what it needs of the prompt, a gate say, in
    an empty response. The parameters are frozen (`requires_grad_(False)`).

    Raises ValueError where the model is no causal backbone, where without `head` it has no scalar `score`, or where its
    branches do not agree with its plain forward; `open` does where such a head does not find what it needs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        head: Readout | Head | None = None,
        format: Format | None = None,
    ) -> None:
        if model.config.is_encoder_decoder:
            raise ValueError(f"reward model is a {type(model).__name__}, which is no causal backbone with a head")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.head = head or _linear_score(model)
        self.format = format or default_format(tokenizer)
        # It is found out, and checked, once a model: now rather than in the first response.
        packing_for(self.model.base_model)
        if not isinstance(self.head, Head):
            _check_readout(self.head, self.model)

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
        head = self.head
        if isinstance(head, Head):
            ids = inputs.encode([""], [(0, 0)])["input_ids"][0]
            with torch.inference_mode():
                head = head.for_prompt(ids, tree.extend(ids))
        return _TextScoring(tree, head, inputs, Responses(conversation))


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
        # The last token of each is left to compute: its hidden state is what is read.
        self._tree.go_to_common([[ids[:-1] for ids in row] for row in rows])
        bases = [len(sequence) for sequence in self._tree.sequences]
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


def _check_readout(head: Readout, model: PreTrainedModel) -> None:
    if model.device.type == "meta":
        return
    width = model.config.get_text_config().hidden_size
    rewards = _read(head, list(torch.ones(2, width, dtype=model.dtype, device=model.device)))
    if not all(map(math.isfinite, rewards)):
        raise ValueError(
            f"head of {type(model).__name__} makes {rewards[0]} of a finite hidden state: its weights are not finite; "
            "use an undamaged checkpoint"
        )


def _linear_score(model: PreTrainedModel) -> Readout:
    score = getattr(model, "score", None)
    if not isinstance(score, torch.nn.Linear) or score.out_features != 1:
        raise ValueError(
            f"reward model {type(model).__name__} has no linear `score` head for one number; pass head=... for "
            "another head, or use EncoderReward for an encoder"
        )
    return lambda hidden: score(hidden)[:, 0]
