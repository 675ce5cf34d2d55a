"""Process reward models: a value for every step of a response, and one reward of them."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from ggro_hf.models import context_length
from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.heads import FeedForward, LoadedBackbone
from ggro_hf.rewards.language_model import LanguageModel, load_language_model
from ggro_hf.rewards.packing import one_by_one, packing_for
from ggro_hf.rewards.responses import Responses, check_prompt_fits, check_response_fits, prompt_of
from ggro_hf.rewards.steps import STEP_FORMATS, EncodedSteps, StepFormat, answer_ids
from ggro_hf.rewards.tree import CausalTree

Reduce = Literal["last", "min", "mean", "product"]

_REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda values: values[-1],
    "min": lambda values: math.nan if any(map(math.isnan, values)) else min(values),
    "mean": lambda values: sum(values) / len(values),
    "product": math.prod,
}


class ProcessReward(Reward):
    """A process reward model on a causal backbone: the value of a step is the probability that it is good.

    That is the sigmoid of a head with one output, the second class of one with two. `format` says how steps are split
    and written, and where they are read; `reduce` makes one reward of their values. An unfinished last step is scored
    as if it ended there, a response without steps as one that has an empty one.

    Raises ValueError where the head is no `FeedForward` with one or two outputs, where there is no tokenizer, and for
    an unknown `reduce`.
    """

    def __init__(self, backbone: LoadedBackbone, format: StepFormat, *, reduce: Reduce = "last") -> None:
        if reduce not in _REDUCTIONS:
            raise ValueError(f"reduce is {reduce!r}, but must be one of {', '.join(_REDUCTIONS)}")
        if not isinstance(backbone.head, FeedForward) or backbone.head.outputs not in (1, 2):
            raise ValueError(
                f"process reward model has a head {type(backbone.head).__name__} with {backbone.head.outputs} outputs, "
                "but the value of a step is read from a FeedForward head with 1 (a logit) or 2 (bad and good)"
            )
        if backbone.tokenizer is None:
            raise ValueError("process reward model has no tokenizer, but it reads text; save one with its checkpoint")
        self.model, self.head, self.tokenizer = backbone.model, backbone.head, backbone.tokenizer
        self.format = format
        self.reduce = reduce
        # It is found out, and checked, once a model: now rather than in the first response.
        packing_for(self.model)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        format: str | StepFormat,
        *,
        reduce: Reduce = "last",
        head: str = "auto",
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load model and tokenizer from a directory or a hub id (safetensors only, no code of the checkpoint).

        `format` is one, or its name in `STEP_FORMATS`; where it has answers, the model is a language model, otherwise
        it has a head as of `LoadedBackbone.from_pretrained`. Raises ValueError for weights that are missing and an
        unknown format, OSError for files that are.
        """
        if isinstance(format, str):
            if format not in STEP_FORMATS:
                raise ValueError(f"format is {format!r}, but there are {', '.join(STEP_FORMATS)}")
            format = STEP_FORMATS[format]
        if format.answers is None:
            backbone = LoadedBackbone.from_pretrained(
                name, head=head, outputs=(1, 2), dtype=dtype, device=device, revision=revision
            )
            return cls(backbone, format, reduce=reduce)
        model, tokenizer = load_language_model(name, dtype=dtype, device=device, revision=revision)
        if tokenizer is None:
            raise ValueError(f"process reward model {str(name)!r} has no tokenizer, but it reads text")
        good, bad = answer_ids(tokenizer, format.answers)
        language_model = LanguageModel("process reward model", model)
        backbone = LoadedBackbone(language_model.backbone, language_model.answers([bad, good]), tokenizer)
        return cls(backbone, format, reduce=reduce)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            reads_ids=False,
            cached_prefix=True,
            tree=packing_for(self.model) is not one_by_one,
            gradient=False,
            max_tokens=context_length(self.model),
        )

    def open(self, conversation: Conversation, counters: Counters, max_new_tokens: int) -> Scoring:
        """As `Reward.open`; a response that is too long is found when it is scored."""
        return _ProcessScoring(self, conversation, counters, max_new_tokens)

    def values(self, hidden: Tensor) -> list[float]:
        """Values of steps that are read at hidden states [n, d]."""
        outputs = self.head(hidden)
        logits = outputs if self.head.outputs == 1 else outputs[:, 1] - outputs[:, 0]
        return logits.double().sigmoid().tolist()


class _ProcessScoring(Scoring):
    """The sequences of the tree are inputs up to the last place to read; the value at every token of them is known, so
    that a step in what inputs have in common with them is read without computing it again.
    """

    def __init__(self, reward: ProcessReward, conversation: Conversation, counters: Counters, max_tokens: int) -> None:
        self._reward = reward
        self._prompt = prompt_of(conversation)
        self._responses = Responses(conversation)
        self._limit = reward.capabilities.max_tokens
        tokens = len(self._encode("").token_ids)
        check_prompt_fits("process reward model", tokens, self._limit)
        self._tree = CausalTree(reward.model, counters, capacity=tokens + max_tokens)
        self._values: list[list[float]] = [[]]
        self._continued: list[list[list[float]]] = []

    @torch.inference_mode()
    def score(self, continuations: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        texts = self._responses.extend(continuations)
        encode = cache(self._encode)
        inputs = [[encode(text) for text in own] for own in texts]
        self._check_room(inputs, texts)
        gained = self._tree.go_to_common([{tuple(encoded.token_ids) for encoded in own} for own in inputs])
        self._values = [
            known[: len(sequence)] for known, sequence in zip(self._values, self._tree.sequences, strict=True)
        ]
        if gained is not None:
            self._values = [self._values[0] + self._reward.values(gained)]
        branches = [
            [encoded.token_ids[len(known) :] for encoded in own]
            for known, own in zip(self._values, inputs, strict=True)
        ]
        hidden = self._tree.branch(branches)
        # The hidden state that comes with an empty branch is that of a token whose value is known.
        states = [state for own in zip(hidden, branches, strict=True) for state, ids in zip(*own, strict=True) if ids]
        values = iter(self._reward.values(torch.cat(states)) if states else [])
        self._continued = [
            [known + [next(values) for _ in branch] for branch in own]
            for known, own in zip(self._values, branches, strict=True)
        ]
        reduce = _REDUCTIONS[self._reward.reduce]
        return [
            [reduce([known[at] for at in encoded.positions]) for known, encoded in zip(*own, strict=True)]
            for own in zip(self._continued, inputs, strict=True)
        ]

    def keep(self, chosen: Sequence[tuple[int, int]]) -> None:
        self._responses.keep(chosen)
        self._tree.keep(chosen)
        self._values = [self._continued[sequence][continuation] for sequence, continuation in chosen]

    def _encode(self, response: str) -> EncodedSteps:
        format = self._reward.format
        encoded = format.encode(self._reward.tokenizer, self._prompt, format.steps(response))
        # What follows the last place to read, the end of the turn say, changes no value.
        return encoded._replace(token_ids=encoded.token_ids[: encoded.positions[-1] + 1])

    def _check_room(self, inputs: list[list[EncodedSteps]], texts: list[list[str]]) -> None:
        for sequence, own in enumerate(inputs):
            for continuation, encoded in enumerate(own):
                text = texts[sequence][continuation]
                place = (sequence, continuation)
                check_response_fits("process reward model", len(encoded.token_ids), self._limit, place, text)
