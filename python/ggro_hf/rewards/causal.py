"""The fast path: a scalar head on a causal backbone that reads the policy's token ids."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.cache import Branch, RewindableCache, common_prefix_length
from ggro_hf.models import TOLERANCE, check_room, context_length
from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.last_token import LastTokenScoring
from ggro_hf.rewards.loading import load_classifier
from ggro_hf.rewards.packing import one_by_one, packing_for
from ggro_hf.rewards.tree import CausalTree
from ggro_hf.transfer import to_device
from ggro_hf.vocabulary import check_shared_vocabulary

# Tokens of the self-check at load, split into a cached prefix and a segment.
_CHECK_PREFIX, _CHECK_SEGMENT = 5, 4


@dataclass(frozen=True, slots=True)
class SegmentScore:
    """Reward of prefix and segment, and the gradient `[tokens, d]` at the segment's first input embeddings."""

    reward: float
    gradient: torch.Tensor | None


class RewardModel(Reward):
    """A sequence classifier with one label on a causal backbone.

    Only the backbone and the head are called, the head at indices we know: pooling never depends on padding. The
    parameters are frozen (`requires_grad_(False)`). `tokenizer` is used to check that policy and reward share their
    ids.

    Raises ValueError where the model is no causal backbone with a scalar head, or where its cached passes do not
    agree with its plain forward.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        _check_architecture(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._checked_tokenizer: PreTrainedTokenizerBase | None = None
        # It is found out, and checked, once a model: now rather than in the first response.
        packing_for(self.model.base_model)
        self._check_parity()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Load a reward model and its tokenizer from a directory or a hub id (safetensors only).

        `dtype=None` keeps the checkpoint's. Raises ValueError where the checkpoint has no head of its own, more than
        one label, or no causal backbone; OSError where files are missing, SafetensorError
        where one is damaged.
        """
        return cls(
            *load_classifier(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, revision=revision)
        )

    @property
    def capabilities(self) -> Capabilities:
        tree = packing_for(self.model.base_model) is not one_by_one
        return Capabilities(
            reads_ids=True, cached_prefix=True, tree=tree, gradient=True, max_tokens=context_length(self.model)
        )

    def open(self, conversation: Conversation, counters: Counters, max_new_tokens: int) -> Scoring:
        prompt_ids = conversation.prompt_ids
        check_room("reward model", self.capabilities.max_tokens, len(prompt_ids), max_new_tokens)
        tree = CausalTree(self.model.base_model, counters, capacity=len(prompt_ids) + max_new_tokens)
        tree.extend(list(prompt_ids))
        return LastTokenScoring(tree, lambda hidden: self.model.score(hidden)[:, 0])

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @property
    def embedding_table(self) -> torch.Tensor:
        """Input embeddings `[V, d]`, one row a token id."""
        return self.model.get_input_embeddings().weight

    @property
    def embedding_scale(self) -> float:
        """What a look-up multiplies a row of the table with (Gemma-3: sqrt(d)); gradients are taken after it."""
        return float(getattr(self.model.get_input_embeddings(), "embed_scale", 1.0))

    def check_tokenizer(self, policy_tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError unless the policy's token ids mean the same to this model (checked once a tokenizer)."""
        if self.tokenizer is not None and policy_tokenizer is not self._checked_tokenizer:
            check_shared_vocabulary(policy_tokenizer, self.tokenizer, self.embedding_table.shape[0])
            self._checked_tokenizer = policy_tokenizer

    def score(self, token_ids: list[int]) -> float:
        """Reward of a whole sequence of token ids, read at its last token."""
        return RewardPrefix(self, Counters()).extend(list(token_ids))

    def _check_parity(self) -> None:
        """Compare a cached prefix and a segment with gradients with the model's own forward, once, at load."""
        if self.device.type == "meta":
            return
        rows = self.embedding_table.shape[0]
        ids = [(7 * i + 1) % rows for i in range(_CHECK_PREFIX + _CHECK_SEGMENT)]
        padding = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        ids = [i if i != padding else (i + 1) % rows for i in ids]
        prefix = RewardPrefix(self, Counters())
        prefix.extend(ids[:_CHECK_PREFIX])
        cached = prefix.score(ids[_CHECK_PREFIX:], gradient_tokens=1).reward
        with torch.inference_mode(False), torch.no_grad():
            plain = float(self.model(input_ids=torch.tensor([ids], device=self.device)).logits[0, 0])
        tolerance = TOLERANCE[self.model.dtype] * max(1.0, abs(plain))
        if not abs(cached - plain) <= tolerance:
            raise ValueError(
                f"reward model {type(self.model).__name__} answers {plain:.6g} in one pass and {cached:.6g} with a "
                f"cached prefix (tolerance {tolerance:.1g}): its backbone is not causal or its weights are not finite"
            )


class RewardPrefix:
    """A sequence whose keys and values the reward model holds as constants, and the segments scored after it.

    `token_ids` is the committed sequence, `reward` its own reward. `score` leaves the segment behind the prefix in
    the cache until the next call; `save`, `restore` and `commit` turn the chosen one into prefix without computing it
    again.
    """

    def __init__(self, reward_model: RewardModel, counters: Counters, capacity: int = 0) -> None:
        self.reward_model = reward_model
        self._backbone = reward_model.model.base_model
        self._head = reward_model.model.score
        self._embedding = reward_model.model.get_input_embeddings()
        self._counters = counters
        self._cache = RewindableCache(reward_model.model.config, capacity)
        self.token_ids: list[int] = []
        self.reward = float("nan")

    def extend(self, token_ids: list[int]) -> float:
        """Append tokens to the prefix and return the reward of the whole."""
        self._cache.rewind(len(self.token_ids))
        with torch.inference_mode(False), torch.no_grad():
            self.reward = float(self._read(self._embed(token_ids)))
        self.token_ids += token_ids
        return self.reward

    def move_to(self, token_ids: list[int]) -> float:
        """Make the prefix `token_ids`, recomputing only what follows the longest common prefix; return its reward."""
        if token_ids != self.token_ids:
            kept = min(common_prefix_length(self.token_ids, token_ids), len(token_ids) - 1)
            del self.token_ids[kept:]
            self.extend(token_ids[kept:])
        return self.reward

    def score(self, segment: list[int], gradient_tokens: int = 0) -> SegmentScore:
        """Reward of prefix and `segment`, with the gradient at its first `gradient_tokens` embeddings.

        The prefix is a constant: a causal model's gradient at a later position does not depend on it being one.
        """
        if not segment:
            return SegmentScore(self.reward, None)
        self._cache.rewind(len(self.token_ids))
        with torch.inference_mode(False), torch.set_grad_enabled(gradient_tokens > 0):
            embeddings = self._embed(segment)
            if not gradient_tokens:
                return SegmentScore(float(self._read(embeddings)), None)
            embeddings.requires_grad_(True)
            reward = self._read(embeddings)
            (gradient,) = torch.autograd.grad(reward, embeddings)
        self._counters.reward_backward_tokens += len(segment)
        return SegmentScore(float(reward.detach()), gradient[0, :gradient_tokens])

    def save(self, segment: list[int]) -> Branch:
        """Copy the keys and values of the segment scored last."""
        return self._cache.save(segment)

    def restore(self, branch: Branch) -> None:
        """Put a saved segment behind the prefix again."""
        self._cache.rewind(len(self.token_ids))
        self._cache.restore(branch)

    def commit(self, segment: list[int], reward: float) -> None:
        """Make the segment that is behind the prefix part of it."""
        self.token_ids += segment
        self.reward = reward

    def _embed(self, token_ids: list[int]) -> torch.Tensor:
        return self._embedding(to_device([token_ids], self._embedding.weight.device)).detach()

    def _read(self, embeddings: torch.Tensor) -> torch.Tensor:
        output = self._backbone(inputs_embeds=embeddings, past_key_values=self._cache, use_cache=True)
        self._counters.reward_forward_tokens += embeddings.shape[1]
        return self._head(output.last_hidden_state[0, -1])[0]


def _check_architecture(model: PreTrainedModel) -> None:
    name = type(model).__name__
    head = getattr(model, "score", None)
    if model.config.is_encoder_decoder or not isinstance(head, torch.nn.Linear) or model.base_model is model:
        raise ValueError(
            f"reward model is a {name}, but gradients and cached prefixes need a causal backbone with a linear `score` "
            "head (a LlamaForSequenceClassification, say); an encoder such as BERT or DeBERTa reads both directions"
        )
    if head.out_features != 1:
        raise ValueError(
            f"reward model {name} has {head.out_features} labels, but a reward is one number; "
            "use one trained with num_labels=1"
        )
