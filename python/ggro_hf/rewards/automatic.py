"""The reward that a checkpoint is, found out from its architecture, its tensors and its tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.models import embedding_rows
from ggro_hf.rewards.base import Reward
from ggro_hf.rewards.causal import RewardModel
from ggro_hf.rewards.encoder import EncoderReward
from ggro_hf.rewards.head_reward import HeadReward
from ggro_hf.rewards.heads import LoadedBackbone, head_tensors
from ggro_hf.rewards.loading import load_classifier, require_tokenizer
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

    A classifier on an encoder becomes an `EncoderReward`; a causal backbone that shares the policy's token ids a
    `RewardModel`, or a `HeadReward` where it is no classifier with a linear `score`; with another tokenizer a
    `TextReward`. A model without a tokenizer is taken to share the ids. `dtype=None` keeps the checkpoint's.

    Raises what these raise: ValueError where the checkpoint has no head of its own, several outputs or an architecture
    that none of them reads, OSError where files are missing.
    """
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(f"reward model {str(name)!r}: there is no such directory; give one, or a hub id")
    where: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision}
    config = AutoConfig.from_pretrained(name, revision=revision or "main")
    classifier = any("ForSequenceClassification" in architecture for architecture in config.architectures or ())
    heads = head_tensors(name, revision)
    # Classifiers on encoders have heads of many names, none of them ours.
    if classifier and (not heads or "score.weight" in heads):
        model, tokenizer = load_classifier(name, **where)
        if not hasattr(model, "score"):
            return EncoderReward(model, require_tokenizer(tokenizer, name))
        if tokenizer is None or _share_ids(policy_tokenizer, tokenizer, model):
            return RewardModel(model, tokenizer)
        return TextReward(model, tokenizer)
    backbone = LoadedBackbone.from_pretrained(name, **where)
    if backbone.tokenizer is None or _share_ids(policy_tokenizer, backbone.tokenizer, backbone.model):
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


def _share_ids(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase, model: PreTrainedModel) -> bool:
    try:
        check_shared_vocabulary(policy, reward, embedding_rows(model))
    except ValueError:
        return False
    return True
