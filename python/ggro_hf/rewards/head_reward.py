"""Heads other than a linear `score` on a causal backbone that reads the policy's token ids."""

from pathlib import Path
from typing import Self

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.models import check_room, context_length, embedding_rows
from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.heads import LoadedBackbone
from ggro_hf.rewards.last_token import LastTokenScoring
from ggro_hf.rewards.packing import one_by_one, packing_for
from ggro_hf.rewards.tree import CausalTree
from ggro_hf.vocabulary import check_shared_vocabulary


class HeadReward(Reward):
    """A head with one output, read at the last token of every continuation; the turn is left open.

    What the head needs of the prompt, a gate say, it computes once a response.

    Raises ValueError where the head has several outputs, or where branches behind a cached prefix do not agree with a
    plain forward.
    """

    def __init__(self, backbone: LoadedBackbone) -> None:
        if backbone.head.outputs != 1:
            raise ValueError(
                f"head {type(backbone.head).__name__} has {backbone.head.outputs} outputs, but a reward is one number; "
                "use one with 1, or ProcessReward for the classes of steps"
            )
        self.model, self.head, self.tokenizer = backbone.model, backbone.head, backbone.tokenizer
        self._checked_tokenizer: PreTrainedTokenizerBase | None = None
        # It is found out, and checked, once a model: now rather than in the first response.
        packing_for(self.model)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        head: str = "auto",
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a reward model from a directory or a hub id; as `LoadedBackbone.from_pretrained`."""
        return cls(LoadedBackbone.from_pretrained(name, head=head, dtype=dtype, device=device, revision=revision))

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            reads_ids=True,
            cached_prefix=True,
            tree=packing_for(self.model) is not one_by_one,
            gradient=False,
            max_tokens=context_length(self.model),
        )

    def open(self, conversation: Conversation, counters: Counters, max_new_tokens: int) -> Scoring:
        """As `Reward.open`; raises ValueError, too, where the head does not find in the prompt what it needs."""
        prompt_ids = list(conversation.prompt_ids)
        check_room("reward model", self.capabilities.max_tokens, len(prompt_ids), max_new_tokens)
        tree = CausalTree(self.model, counters, capacity=len(prompt_ids) + max_new_tokens)
        with torch.inference_mode():
            readout = self.head.for_prompt(prompt_ids, tree.extend(prompt_ids))
        return LastTokenScoring(tree, readout)

    def check_tokenizer(self, policy_tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError unless the policy's token ids mean the same to this model (checked once a tokenizer)."""
        if self.tokenizer is not None and policy_tokenizer is not self._checked_tokenizer:
            check_shared_vocabulary(policy_tokenizer, self.tokenizer, embedding_rows(self.model))
            self._checked_tokenizer = policy_tokenizer
