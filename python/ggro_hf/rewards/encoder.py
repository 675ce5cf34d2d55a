"""Encoders as rewards: they read both directions, so every response is a full pass."""

from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.models import context_length
from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.formats import ChatTemplate, Format, Pair
from ggro_hf.rewards.loading import load_classifier, require_tokenizer
from ggro_hf.rewards.responses import PromptInputs, ResponseScoring


class EncoderReward(Reward):
    """A sequence classifier with one label on an encoder (BERT, DeBERTa, ...).

    Equal inputs are computed once, at most `batch_size` of similar length in one padded pass. `format` is by default
    the tokenizer's chat template, the pair of prompt and response where it has none. Inputs that are longer than the
    model's or its tokenizer's limit are refused, never cut off. The parameters are frozen (`requires_grad_(False)`).

    Raises ValueError where the model is causal (`TextReward` computes those with less work) or has several labels,
    where the tokenizer has no padding token, and for a `batch_size` below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        format: Format | None = None,
        batch_size: int = 16,
    ) -> None:
        _check_model(model)
        if tokenizer.pad_token_id is None:
            raise ValueError("the encoder's tokenizer has no padding token; set tokenizer.pad_token")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.format = format or (Pair() if tokenizer.chat_template is None else ChatTemplate(tokenizer))
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        format: Format | None = None,
        batch_size: int = 16,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Load an encoder and its tokenizer from a directory or a hub id; raises what `load_classifier` does."""
        model, tokenizer = load_classifier(
            name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, revision=revision
        )
        return cls(model, require_tokenizer(tokenizer, name), format=format, batch_size=batch_size)

    @property
    def capabilities(self) -> Capabilities:
        # RoBERTa counts two positions that no token can have; its tokenizer knows the real limit.
        limits = [context_length(self.model), self.tokenizer.model_max_length]
        return Capabilities(
            reads_ids=False,
            cached_prefix=False,
            tree=False,
            gradient=False,
            max_tokens=min(limit for limit in limits if limit is not None),
        )

    def open(self, conversation: Conversation, counters: Counters, max_new_tokens: int) -> Scoring:
        """As `Reward.open`; a response that is too long is found when it is scored."""
        return _EncoderScoring(self, conversation, counters)


class _EncoderScoring(ResponseScoring):
    def __init__(self, reward: EncoderReward, conversation: Conversation, counters: Counters) -> None:
        super().__init__(conversation)
        self._reward = reward
        self._counters = counters
        self._inputs = PromptInputs(reward.format, reward.tokenizer, conversation, reward.capabilities.max_tokens)

    def _compute(self, responses: list[str], places: list[tuple[int, int]]) -> list[float]:
        encoded = self._inputs.encode(responses, places)
        rows = [{name: encoded[name][index] for name in encoded} for index in range(len(responses))]
        first: dict[tuple[tuple[int, ...], ...], int] = {}
        same = [first.setdefault(tuple(map(tuple, row.values())), index) for index, row in enumerate(rows)]
        order = sorted(first.values(), key=lambda index: len(rows[index]["input_ids"]))
        rewards: dict[int, float] = {}
        for start in range(0, len(order), self._reward.batch_size):
            batch = order[start : start + self._reward.batch_size]
            rewards.update(zip(batch, self._forward([rows[index] for index in batch]), strict=True))
        return [rewards[index] for index in same]

    def _forward(self, rows: list[dict[str, list[int]]]) -> list[float]:
        inputs = self._reward.tokenizer.pad(rows, return_tensors="pt").to(self._reward.model.device)
        self._counters.reward_forward_tokens += inputs["input_ids"].numel()
        with torch.no_grad():
            return self._reward.model(**inputs).logits[:, 0].tolist()


def _check_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if hasattr(model, "score"):
        raise ValueError(f"reward model is a {name}, which is causal; use TextReward, which caches what texts share")
    if model.config.num_labels != 1:
        raise ValueError(
            f"reward model {name} has {model.config.num_labels} labels, but a reward is one number; "
            "use one trained with num_labels=1"
        )
