"""The fast path: a scalar head on a causal backbone that reads the policy's token ids."""

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.cache import KeysAndValues, RewindableCache, common_prefix_length
from ggro_hf.models import TOLERANCE, check_room, context_length, disagreement
from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.behind import Behind
from ggro_hf.rewards.last_token import LastTokenScoring
from ggro_hf.rewards.loading import load_classifier
from ggro_hf.rewards.packing import one_by_one, packing_for
from ggro_hf.rewards.segment_pass import SegmentPasses, SegmentScore
from ggro_hf.rewards.tree import CausalTree
from ggro_hf.transfer import to_device
from ggro_hf.vocabulary import check_shared_vocabulary

# Tokens of the self-check at load, split into a cached prefix and a segment.
_CHECK_PREFIX, _CHECK_SEGMENT = 5, 4

_logger = logging.getLogger(__name__)


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
        # What scores segments, unless its attention is of a kind that only the model itself computes.
        self.passes: SegmentPasses | None = None
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
        prefix, segment = RewardPrefix(self, Counters()), ids[_CHECK_PREFIX:]
        prefix.extend(ids[:_CHECK_PREFIX])
        (cached,) = prefix.score_one_by_one([segment], 1)
        with torch.inference_mode(False), torch.no_grad():
            plain = float(self.model(input_ids=torch.tensor([ids], device=self.device)).logits[0, 0])
        tolerance = TOLERANCE[self.model.dtype] * max(1.0, abs(plain))
        if not abs(cached.reward - plain) <= tolerance:
            raise ValueError(
                f"reward model {type(self.model).__name__} answers {plain:.6g} in one pass and {cached.reward:.6g} "
                f"with a cached prefix (tolerance {tolerance:.1g}): its backbone is not causal or its weights are not "
                "finite"
            )
        self._check_passes(prefix, segment, cached)

    def _check_passes(self, prefix: "RewardPrefix", segment: list[int], expected: SegmentScore) -> None:
        """Let segments go through passes of ours where these give what the model's own attention does."""

        def computed() -> torch.Tensor:
            passes = SegmentPasses(self.model)
            # Recorded with other tokens than it is checked with, so that values that are taken for constants show.
            for own in (segment[::-1], segment):
                _, scored = passes.score([prefix.behind([own[:1], own])], [1])
            return _flat(scored)

        reason = disagreement("rewards and gradients", computed, _flat(expected), self.model.dtype)
        if reason is None:
            self.passes = SegmentPasses(self.model)
        else:
            _logger.warning("%s scores one segment at a time: %s", type(self.model).__name__, reason)


def _flat(scored: SegmentScore) -> torch.Tensor:
    assert scored.gradient is not None
    gradient = scored.gradient.double().flatten()
    return torch.cat([gradient.new_tensor([scored.reward]), gradient])


class RewardPrefix:
    """A sequence whose keys and values the reward model holds as constants, and the segments scored after it.

    `token_ids` is the committed sequence, `reward` its own reward. `score` leaves the segment behind the prefix in
    the cache until the next call; `read` and `commit` turn the chosen one into prefix without computing it again.
    """

    def __init__(self, reward_model: RewardModel, counters: Counters, capacity: int = 0) -> None:
        self.reward_model = reward_model
        self._backbone = reward_model.model.base_model
        self._head = reward_model.model.score
        self._embedding = reward_model.model.get_input_embeddings()
        self._counters = counters
        self._cache = RewindableCache(reward_model.model.config, capacity)
        if reward_model.passes is not None:
            reward_model.passes.refresh()
        self.token_ids: list[int] = []
        self.reward = float("nan")

    def extend(self, token_ids: list[int]) -> float:
        """Append tokens to the prefix and return the reward of the whole."""
        self._cache.rewind(len(self.token_ids))
        with torch.inference_mode(False), torch.no_grad():
            self.reward = float(self._read(self._embed(token_ids)))
        self.count(len(token_ids), backward=False)
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
        return score_segments([(self, [segment])], gradient_tokens)[0][0]

    def score_one_by_one(self, segments: list[list[int]], gradient_tokens: int) -> list[SegmentScore]:
        """Scores of segments, none of which may be empty, by a pass of the model's own attention for each."""
        scores, layers, start = [], [], len(self.token_ids)
        for segment in segments:
            self._cache.rewind(start)
            with torch.inference_mode(False), torch.set_grad_enabled(gradient_tokens > 0):
                embeddings = self._embed(segment).requires_grad_(gradient_tokens > 0)
                reward = self._read(embeddings)
                gradient = torch.autograd.grad(reward, embeddings)[0][0, :gradient_tokens] if gradient_tokens else None
            scores.append((float(reward.detach()), gradient))
            # A single one lies where it is to lie.
            if len(segments) > 1:
                layers.append(self._cache.read(start, start + len(segment)))
        if layers:
            self._cache.rewind(start)
        for own in layers:
            self._cache.write(own)
        places = self.behind(segments).places
        return [SegmentScore(*score, place) for score, place in zip(scores, places, strict=True)]

    def behind(self, segments: list[list[int]]) -> Behind:
        """The segments as a pass takes them."""
        return Behind(self._cache, len(self.token_ids), segments)

    def count(self, tokens: int, *, backward: bool) -> None:
        """Add a pass over so many tokens behind the prefix to the counters."""
        self._counters.reward_forward_tokens += tokens
        self._counters.reward_backward_tokens += tokens if backward else 0

    def read(self, place: tuple[int, int]) -> KeysAndValues:
        """Copy the keys and values of a segment scored last."""
        return self._cache.read(*place)

    def commit(self, segment: list[int], reward: float, found: tuple[int, int] | KeysAndValues) -> None:
        """Make a segment part of the prefix; `found` is its place, if it was scored last, or what `read` copied."""
        length = len(self.token_ids)
        if isinstance(found[0], int):
            self._cache.keep_branch(length, *found)
        else:
            self._cache.rewind(length)
            self._cache.write(found)
        self.token_ids += segment
        self.reward = reward

    def _embed(self, token_ids: list[int]) -> torch.Tensor:
        return self._embedding(to_device([token_ids], self._embedding.weight.device)).detach()

    def _read(self, embeddings: torch.Tensor) -> torch.Tensor:
        output = self._backbone(inputs_embeds=embeddings, past_key_values=self._cache, use_cache=True)
        return self._head(output.last_hidden_state[0, -1])[0]


def score_segments(
    works: Sequence[tuple[RewardPrefix, list[list[int]]]], gradient_tokens: int | Sequence[int] = 0
) -> list[list[SegmentScore]]:
    """`RewardPrefix.score` of segments behind different prefixes of one model, in one pass where it allows that.

    `gradient_tokens` is one number, or one for every prefix. The segments of a prefix stay behind it in its cache until
    the next call. Empty ones cost nothing.
    """
    each = [gradient_tokens] * len(works) if isinstance(gradient_tokens, int) else gradient_tokens
    full = [
        (prefix, own, wanted)
        for (prefix, segments), wanted in zip(works, each, strict=True)
        if (own := [segment for segment in segments if segment])
    ]
    scores = iter(_score_full(full) if full else [])
    return [
        [next(scores) if segment else SegmentScore(prefix.reward, None, None) for segment in segments]
        for prefix, segments in works
    ]


def _score_full(works: list[tuple[RewardPrefix, list[list[int]], int]]) -> list[SegmentScore]:
    passes = works[0][0].reward_model.passes
    alone = len(works) == len(works[0][1]) == 1
    # Where nothing is recorded, a single segment is served best by the model's own attention, of one kernel.
    if passes is not None and alone and not passes.records:
        passes = None
    if passes is None:
        scores = [score for prefix, own, wanted in works for score in prefix.score_one_by_one(own, wanted)]
    else:
        scores = passes.score([prefix.behind(own) for prefix, own, _ in works], [wanted for *_, wanted in works])
    # Only now, so that a pass that fails can be repeated.
    for prefix, segments, wanted in works:
        prefix.count(sum(map(len, segments)), backward=wanted > 0)
    return scores if passes is None else list(_without_strangers(works, scores))


def _without_strangers(
    works: list[tuple[RewardPrefix, list[list[int]], int]], scores: list[SegmentScore]
) -> Iterator[SegmentScore]:
    """The scores of segments, those behind a prefix again where one is NaN.

    What a mask hides is multiplied by zero, so one segment's NaN reaches the others behind its prefix.
    """
    together = iter(scores)
    for prefix, segments, wanted in works:
        own = list(itertools.islice(together, len(segments)))
        if len(own) > 1 and any(math.isnan(score.reward) for score in own):
            own = prefix.score_one_by_one(segments, wanted)
            prefix.count(sum(map(len, segments)), backward=wanted > 0)
        yield from own


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
