"""Policies with reward models on which decoding is measured: random ones of any vocabulary, and the embedded demo's."""

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from ggro_hf import Decoder, Greedy, RewardModel, demo_models
from ggro_hf.decoding.base import Request
from ggro_hf.results import Generation

PROMPT_TOKENS, NEW_TOKENS = 128, 64
EOT = "<|eot_id|>"


@dataclass
class Pair:
    """The two models, a tokenizer whose text state keeps ids, a prompt, and a threshold that cuts segments."""

    policy: LlamaForCausalLM
    reward: RewardModel
    tokenizer: PreTrainedTokenizerFast
    prompt: list[int]
    threshold: float


def build_pair(vocabulary: int, prompt_tokens: int = PROMPT_TOKENS) -> Pair:
    """Seeded random models; the head is widened until next-token entropies are those of a real model, a few nats."""
    torch.manual_seed(0)
    policy = LlamaForCausalLM(llama_config(vocabulary)).eval()
    # Every method is to decode the same number of tokens.
    policy.generation_config.eos_token_id = None
    with torch.no_grad():
        policy.lm_head.weight.mul_(8.0)
    reward = RewardModel(LlamaForSequenceClassification(llama_config(vocabulary, num_labels=1)))
    prompt = torch.randint(3, vocabulary, (prompt_tokens,)).tolist()
    entropies = sorted(respond(Greedy(), policy, prompt).trace.entropies)
    threshold = entropies[int(0.7 * len(entropies))]
    return Pair(policy, reward, word_tokenizer(vocabulary), prompt, threshold)


def llama_config(vocabulary: int, **changes: Any) -> LlamaConfig:
    """512 wide, 6 layers."""
    return LlamaConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1376,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        eos_token_id=2,
        pad_token_id=0,
        **changes,
    )


def build_embedded_pair() -> Pair:
    """The embedded models, where Python and not arithmetic takes most of a step."""
    policy = LlamaForCausalLM.from_pretrained(demo_models.POLICY, dtype=torch.float32)
    policy.generation_config.eos_token_id = None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_models.POLICY)
    reward = RewardModel.from_pretrained(demo_models.REWARD, dtype=torch.float32)
    return Pair(policy, reward, tokenizer, tokenizer(demo_models.PROMPTS[0])["input_ids"], 3.0)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word a token: decoding and encoding again never changes ids, so the text state costs time only."""
    # `StopStringCriteria` tokenises a word of its own to find out how tokens join.
    words = {f"w{index}": index for index in range(vocabulary) if index not in (1, 2)} | {"abcdef": 1, EOT: 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOT, pad_token="w0", clean_up_tokenization_spaces=False
    )


def respond(decoder: Decoder, policy: LlamaForCausalLM, prompt: list[int], row: int = 0) -> Generation:
    """One response of `NEW_TOKENS` tokens, without end-of-sequence."""
    return decoder.respond(Request(policy, prompt, NEW_TOKENS, frozenset(), row))
