"""The reward that a preference-tuned language model implies: its log-probabilities against those of its reference."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.models import check_room, context_length, embedding_rows
from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.language_model import LanguageModel, load_language_model
from ggro_hf.rewards.packing import one_by_one, packing_for
from ggro_hf.rewards.tree import CausalTree
from ggro_hf.transfer import to_device, to_host
from ggro_hf.vocabulary import check_shared_vocabulary


class ImplicitReward(Reward):
    """`beta * sum_t (log p(y_t | x, y_<t) - log p_ref(y_t | x, y_<t))` over the tokens y of the response to x.

    This is the reward, up to a constant of the prompt, whose optimum under a KL penalty `beta` is the tuned model
    (Rafailov et al. 2023, arXiv:2305.18290, equation 5; as guidance: Zhou et al. 2024, arXiv:2405.19262). Both models
    read the policy's token ids. The parameters are frozen (`requires_grad_(False)`). `tokenizers` are used to check
    that the ids mean the same.

    Raises ValueError where beta is not a finite number above 0, or where a model is no causal language model with one
    linear head whose log-probabilities we reproduce.
    """

    def __init__(
        self,
        tuned: PreTrainedModel,
        reference: PreTrainedModel,
        *,
        beta: float = 1.0,
        tokenizers: Iterable[PreTrainedTokenizerBase] = (),
    ) -> None:
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta is {beta}, but must be a finite number above 0")
        self.beta = beta
        self.tuned = LanguageModel("tuned model", tuned)
        self.reference = LanguageModel("reference model", reference)
        self.tokenizers = tuple(tokenizers)
        self._checked_tokenizer: PreTrainedTokenizerBase | None = None
        # It is found out, and checked, once a model: now rather than in the first response.
        for model in (self.tuned, self.reference):
            packing_for(model.backbone)

    @classmethod
    def from_pretrained(
        cls,
        tuned: str | Path,
        reference: str | Path,
        *,
        beta: float = 1.0,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load both models and their tokenizers from directories or hub ids (safetensors only).

        `dtype=None` keeps the checkpoints'. Raises ValueError where weights are missing, OSError where files are.
        """
        loaded = [load_language_model(name, dtype=dtype, device=device) for name in (tuned, reference)]
        tokenizers = [tokenizer for _, tokenizer in loaded if tokenizer is not None]
        return cls(*(model for model, _ in loaded), beta=beta, tokenizers=tokenizers)

    @property
    def capabilities(self) -> Capabilities:
        both = (self.tuned.backbone, self.reference.backbone)
        limits = [limit for backbone in both if (limit := context_length(backbone)) is not None]
        return Capabilities(
            reads_ids=True,
            cached_prefix=True,
            tree=all(packing_for(backbone) is not one_by_one for backbone in both),
            gradient=False,
            max_tokens=min(limits, default=None),
        )

    def open(self, conversation: Conversation, counters: Counters, max_new_tokens: int) -> Scoring:
        prompt_ids = list(conversation.prompt_ids)
        check_room("implicit reward's models", self.capabilities.max_tokens, len(prompt_ids), max_new_tokens)
        return _ImplicitScoring(self, prompt_ids, counters, len(prompt_ids) + max_new_tokens)

    def check_tokenizer(self, policy_tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError unless the policy's token ids mean the same to both models (checked once a tokenizer)."""
        if policy_tokenizer is not self._checked_tokenizer:
            rows = min(embedding_rows(self.tuned.model), embedding_rows(self.reference.model))
            for tokenizer in self.tokenizers:
                check_shared_vocabulary(policy_tokenizer, tokenizer, rows)
            self._checked_tokenizer = policy_tokenizer


class _ImplicitScoring(Scoring):
    """The tree has every sequence without its last token, which each continuation's branch begins with.

    A branch ends before its continuation's last token: what comes after that has no probability to give yet. So the
    candidates for one next token are one branch of one token, whatever their number.
    """

    def __init__(self, reward: ImplicitReward, prompt_ids: list[int], counters: Counters, capacity: int) -> None:
        if not prompt_ids:
            raise ValueError("prompt has no tokens, but the first token of the response needs one to follow")
        self._beta = reward.beta
        self._models = (reward.tuned, reward.reference)
        self._trees = [CausalTree(model.backbone, counters, capacity) for model in self._models]
        if prompt_ids[:-1]:
            for tree in self._trees:
                tree.extend(prompt_ids[:-1])
        self._last = [prompt_ids[-1]]
        self._rewards = [0.0]
        self._continued: list[list[tuple[int, float]]] = []

    @torch.inference_mode()
    def score(self, continuations: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        if len(continuations) != len(self._last):
            raise ValueError(
                f"continuations has {len(continuations)} lists for {len(self._last)} sequences; give one for each"
            )
        branches = [
            [[last, *tokens[:-1]] if tokens else [] for tokens in own]
            for last, own in zip(self._last, continuations, strict=True)
        ]
        tuned, reference = (
            _of_branches(model, branches, continuations, tree.branch(branches))
            for model, tree in zip(self._models, self._trees, strict=True)
        )
        gains = iter(self._gains(tuned, reference, continuations))
        self._continued = [
            [(tokens[-1] if tokens else last, so_far + next(gains)) for tokens in own]
            for last, so_far, own in zip(self._last, self._rewards, continuations, strict=True)
        ]
        return [[reward for _, reward in own] for own in self._continued]

    def keep(self, chosen: Sequence[tuple[int, int]]) -> None:
        for tree in self._trees:
            tree.keep(chosen)
        kept = [self._continued[sequence][continuation] for sequence, continuation in chosen]
        self._last = [last for last, _ in kept]
        self._rewards = [reward for _, reward in kept]

    def _gains(
        self, tuned: list[float], reference: list[float], continuations: Sequence[Sequence[list[int]]]
    ) -> list[float]:
        ratios = iter([first - second for first, second in zip(tuned, reference, strict=True)])
        return [self._beta * sum(next(ratios) for _ in tokens) for own in continuations for tokens in own]


def _of_branches(
    model: LanguageModel,
    branches: list[list[list[int]]],
    continuations: Sequence[Sequence[list[int]]],
    hidden: list[list[Tensor]],
) -> list[float]:
    """Log-probabilities of all continuations' tokens in order; equal branches of a sequence share their rows."""
    states: list[Tensor] = []
    rows: list[int] = []
    tokens: list[int] = []
    count = 0
    for own_branches, own_continuations, own_hidden in zip(branches, continuations, hidden, strict=True):
        starts: dict[tuple[int, ...], int] = {}
        for branch, continuation, state in zip(own_branches, own_continuations, own_hidden, strict=True):
            if not continuation:
                continue
            if tuple(branch) not in starts:
                starts[tuple(branch)] = count
                states.append(state)
                count += len(branch)
            start = starts[tuple(branch)]
            rows += range(start, start + len(branch))
            tokens += continuation
    if not tokens:
        return []
    packed = torch.cat(states)
    row_numbers, token_ids = to_device([rows, tokens], packed.device)
    (values,) = to_host(model.log_probabilities(packed, row_numbers, token_ids).double())
    return values.tolist()
