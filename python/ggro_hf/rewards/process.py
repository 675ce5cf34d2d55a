"""Process reward models: a value for every step of a response, and one reward of them."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from ggro_hf.cache import common_prefix_length
from ggro_hf.models import context_length
from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.heads import FeedForward, LoadedBackbone
from ggro_hf.rewards.language_model import LanguageModel, load_language_model
from ggro_hf.rewards.packing import one_by_one, packing_for
from ggro_hf.rewards.responses import ResponseScoring, name_of, prompt_of
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
        return _ProcessScoring(self, conversation, counters)

    def values(self, hidden: Tensor) -> list[float]:
        """Values of steps that are read at hidden states [n, d]."""
        outputs = self.head(hidden)
        logits = outputs if self.head.outputs == 1 else outputs[:, 1] - outputs[:, 0]
        return logits.double().sigmoid().tolist()


class _ProcessScoring(ResponseScoring):
    """What all inputs of a call have in common is a prefix in the cache, with the values that it has at every token;
    the rest of each is a branch.
    """

    def __init__(self, reward: ProcessReward, conversation: Conversation, counters: Counters) -> None:
        super().__init__(conversation)
        self._reward = reward
        self._prompt = prompt_of(conversation)
        self._counters = counters
        self._limit = reward.capabilities.max_tokens
        self._clear()
        tokens = len(self._encode("").token_ids)
        if self._limit is not None and tokens > self._limit:
            raise ValueError(
                f"prompt alone takes {tokens} tokens of the process reward model, whose context has {self._limit}; "
                "shorten the prompt or use a reward model with a longer context"
            )

    @torch.inference_mode()
    def _compute(self, responses: list[str], places: list[tuple[int, int]]) -> list[float]:
        inputs = [self._encode(response) for response in responses]
        for encoded, response, place in zip(inputs, responses, places, strict=True):
            if self._limit is not None and len(encoded.token_ids) > self._limit:
                raise ValueError(
                    f"prompt and response take {len(encoded.token_ids)} tokens of the process reward model, whose "
                    f"context has {self._limit}, at {name_of(place, response)}; lower max_new_tokens, shorten the "
                    "prompt or use a reward model with a longer context"
                )
        self._move_to(_common_prefix([encoded.token_ids for encoded in inputs]))
        shared = len(self._values)
        branches = [encoded.token_ids[shared:] for encoded in inputs]
        (hidden,) = self._tree.branch([branches])
        states = [
            state[position - shared]
            for state, encoded in zip(hidden, inputs, strict=True)
            for position in encoded.positions
            if position >= shared
        ]
        values = iter(self._reward.values(torch.stack(states)) if states else [])
        reduce = _REDUCTIONS[self._reward.reduce]
        return [
            reduce([self._values[at] if at < shared else next(values) for at in encoded.positions])
            for encoded in inputs
        ]

    def _encode(self, response: str) -> EncodedSteps:
        format = self._reward.format
        encoded = format.encode(self._reward.tokenizer, self._prompt, format.steps(response))
        # What follows the last place to read, the end of the turn say, changes no value.
        return encoded._replace(token_ids=encoded.token_ids[: encoded.positions[-1] + 1])

    def _move_to(self, token_ids: list[int]) -> None:
        if not token_ids:
            self._clear()
            return
        hidden = self._tree.move_to(token_ids)
        computed = len(token_ids) - len(hidden)
        self._values[computed:] = self._reward.values(hidden)

    def _clear(self) -> None:
        self._tree = CausalTree(self._reward.model, self._counters)
        self._values: list[float] = []


def _common_prefix(sequences: list[list[int]]) -> list[int]:
    first = sequences[0]
    return first[: min(common_prefix_length(first, sequence) for sequence in sequences)]
