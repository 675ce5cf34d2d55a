"""Heads other than a linear `score` on a causal backbone that reads the policy's token ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.models import TOLERANCE, check_room, context_length, device_of, embedding_rows
from ggro_hf.results import Counters
from ggro_hf.rewards.base import Capabilities, Conversation, Reward, Scoring
from ggro_hf.rewards.heads import LoadedBackbone, Readout
from ggro_hf.rewards.packing import one_by_one, packing_for
from ggro_hf.rewards.tree import CausalTree
from ggro_hf.transfer import to_device
from ggro_hf.vocabulary import check_shared_vocabulary

# Tokens of the self-check at load, split into a cached prefix and a branch.
_CHECK_PREFIX, _CHECK_BRANCH = 5, 4


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
        self._check_parity()

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
        return _HeadScoring(tree, readout)

    def check_tokenizer(self, policy_tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError unless the policy's token ids mean the same to this model (checked once a tokenizer)."""
        if self.tokenizer is not None and policy_tokenizer is not self._checked_tokenizer:
            check_shared_vocabulary(policy_tokenizer, self.tokenizer, embedding_rows(self.model))
            self._checked_tokenizer = policy_tokenizer

    @torch.inference_mode()
    def _check_parity(self) -> None:
        """Compare a branch with a plain forward, once, at load."""
        if self.model.device.type == "meta":
            return
        rows = embedding_rows(self.model)
        ids = [(7 * token + 1) % rows for token in range(_CHECK_PREFIX + _CHECK_BRANCH)]
        tree = CausalTree(self.model, Counters())
        prefix = tree.extend(ids[:_CHECK_PREFIX])
        branch = tree.branch([[ids[_CHECK_PREFIX:], ids[1:]]])[0][0]
        plain = self.model(input_ids=to_device([ids], device_of(self.model)), use_cache=False).last_hidden_state[0]
        error = float((torch.cat([prefix, branch]) - plain).abs().max())
        tolerance = TOLERANCE[self.model.dtype] * max(1.0, float(plain.abs().max()))
        if not error <= tolerance:
            raise ValueError(
                f"reward model {type(self.model).__name__} has other hidden states behind a cached prefix than in one "
                f"pass (off by {error:.2g}, tolerance {tolerance:.1g}): its backbone is not causal or its weights are "
                "not finite"
            )


class _HeadScoring(Scoring):
    """Every continuation is a branch, read at its last token."""

    def __init__(self, tree: CausalTree, readout: Readout) -> None:
        self._tree = tree
        self._readout = readout

    @torch.inference_mode()
    def score(self, continuations: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        hidden = self._tree.branch(continuations)
        last = [branch[-1] for branches in hidden for branch in branches]
        rewards = iter(self._readout(torch.stack(last)).tolist() if last else [])
        return [[next(rewards) for _ in branches] for branches in hidden]

    def keep(self, chosen: Sequence[tuple[int, int]]) -> None:
        self._tree.keep(chosen)
