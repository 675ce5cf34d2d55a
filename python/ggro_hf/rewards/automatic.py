"""The reward that a checkpoint is, found out from its tensors and its tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.rewards.base import Reward
from ggro_hf.rewards.causal import RewardModel
from ggro_hf.rewards.encoder import EncoderReward
from ggro_hf.rewards.head_reward import HeadReward
from ggro_hf.rewards.heads import LoadedBackbone, tensor_names
from ggro_hf.rewards.text import TextReward
from ggro_hf.vocabulary import check_shared_vocabulary


def load_reward(
    name: str | Path,
    policy_tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> Reward:
    """Load a reward model from a directory or a hub id (safetensors only) as what does the least work for the policy.

    An encoder becomes an `EncoderReward`; a causal backbone that shares the policy's token ids a `RewardModel`, or a
    `HeadReward` where its head is no linear `score`; with another tokenizer a `TextReward`. A model without a tokenizer
    is taken to share the ids. `dtype=None` keeps the checkpoint's.

    Raises what these raise: ValueError where the checkpoint has no head of its own, several outputs or an architecture
    that none of them reads, OSError where files are missing.
    """
    where: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision}
    names = tensor_names(name, revision)
    if any(tensor.startswith("classifier.") for tensor in names):
        return EncoderReward.from_pretrained(name, **where)
    shares = _shares_ids(name, policy_tokenizer, revision)
    if "score.weight" in names:
        return RewardModel.from_pretrained(name, **where) if shares else TextReward.from_pretrained(name, **where)
    backbone = LoadedBackbone.from_pretrained(name, **where)
    if shares or backbone.tokenizer is None:
        return HeadReward(backbone)
    return TextReward(backbone.model, backbone.tokenizer, head=backbone.head)


def describe(reward: Reward) -> str:
    """How a reward scores candidates, for people."""
    can = reward.capabilities
    reads = "the policy's token ids" if can.reads_ids else "text"
    if can.tree:
        computes = "candidates of one prefix go through one pass"
    elif can.cached_prefix:
        computes = "a pass for every candidate behind the cached prefix"
    else:
        computes = "every candidate is computed whole"
    return f"{type(reward).__name__} reads {reads}; {computes}"


def _shares_ids(name: str | Path, policy_tokenizer: PreTrainedTokenizerBase, revision: str | None) -> bool:
    where = {"revision": revision or "main"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError):
        return True
    rows = AutoConfig.from_pretrained(name, **where).get_text_config().vocab_size
    try:
        check_shared_vocabulary(policy_tokenizer, tokenizer, rows)
    except ValueError:
        return False
    return True
