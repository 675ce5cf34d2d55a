"""The recorded traces of released code, and the models that they were made with."""

import gzip
import json
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ggro_hf import RewardModel

_DIRECTORY = Path(__file__).parents[1] / "oracle"
SUITES = {
    "bpe_trained": ("bpe2048", "policy_trained"),
    "bpe_rand": ("bpe2048", "policy_rand"),
    "rt_rand": ("rt2048", "policy_rand"),
}
"""Tokenizer and policy of each."""

# Where a margin is smaller than this, another order of summation legitimately gives another token.
NEAR_TIE_MARGIN = 1e-4


@cache
def traces(kind: str, suite: str) -> list[dict]:
    """All cases of a suite: `kind` is "ggro", "args" or "cards"."""
    with gzip.open(_DIRECTORY / f"{kind}-{suite}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def prompts() -> list:
    """The texts that traces name by number."""
    return json.loads((_DIRECTORY / "prompts.json").read_text(encoding="utf-8"))


@cache
def tokenizer(suite: str):
    return AutoTokenizer.from_pretrained(_DIRECTORY / "tokenizers" / SUITES[suite][0])


@cache
def policy(suite: str):
    # The traces come from eager attention.
    return AutoModelForCausalLM.from_pretrained(
        _DIRECTORY / "models" / SUITES[suite][1], dtype=torch.float32, attn_implementation="eager"
    ).eval()


@cache
def reward_model() -> RewardModel:
    return RewardModel.from_pretrained(_DIRECTORY / "models" / "rm", dtype=torch.float32)
