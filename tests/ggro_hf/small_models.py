"""Small seeded models with which the decoders are tested, and a tokenizer made in memory."""

from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

Family = Literal["llama", "qwen3", "gemma3", "mistral"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen3", "gemma3", "mistral")
SLIDING_WINDOW = 8

BEGIN_OF_TEXT, END_OF_TEXT, END_OF_TURN, PAD = 0, 1, 2, 3
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|pad|>")
_MERGES = (
    "t h",
    "th e",
    "Ġ a",
    "Ġ the",
    "i n",
    "e r",
    "a n",
    "an d",
    "o n",
    "Ã ©",
    "e n",
    "Ġ s",
    "r e",
    "Ġ ,",
    "e s",
    "in g",
)


def small_tokenizer(*, clean_up_tokenization_spaces: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE: four special tokens, the 256 bytes, a few merges. Decoding and encoding again may change ids."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [tuple(merge.split(" ")) for merge in _MERGES]
    vocabulary = {token: index for index, token in enumerate(tokens + ["".join(merge) for merge in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[BEGIN_OF_TEXT],
        eos_token=SPECIAL_TOKENS[END_OF_TURN],
        pad_token=SPECIAL_TOKENS[PAD],
        additional_special_tokens=[SPECIAL_TOKENS[END_OF_TEXT]],
        clean_up_tokenization_spaces=clean_up_tokenization_spaces,
    )


def small_config(
    family: Family, *, vocabulary: int, hidden: int = 32, layers: int = 2, **changes: object
) -> PretrainedConfig:
    """Two query heads for each key head; where the family has them, sliding-window layers of 8 tokens."""
    common = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": BEGIN_OF_TEXT,
        "eos_token_id": END_OF_TURN,
        "pad_token_id": PAD,
        # Wide enough for attention and gradients to matter.
        "initializer_range": 0.2,
    }
    alternating = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]
    match family:
        case "llama":
            return LlamaConfig(**common | changes)
        case "qwen3":
            windowed = {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "layer_types": alternating}
            return Qwen3Config(**common | windowed | changes)
        case "gemma3":
            windowed = {
                "sliding_window": SLIDING_WINDOW,
                "layer_types": alternating,
                "query_pre_attn_scalar": hidden // 4,
            }
            return Gemma3TextConfig(**common | windowed | changes)
        case "mistral":
            return MistralConfig(**common | {"sliding_window": SLIDING_WINDOW} | changes)


def small_policy(
    family: Family = "llama",
    *,
    seed: int,
    vocabulary: int,
    gain: float = 1.0,
    eos_token_ids: tuple[int, ...] = (END_OF_TURN,),
    dtype: torch.dtype = torch.float64,
    **shape: object,
) -> PreTrainedModel:
    """A random causal model; `gain` widens the head: the larger it is, the lower the entropies."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            small_config(family, vocabulary=vocabulary, **shape), dtype=torch.float32
        )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(gain)
    model.generation_config.eos_token_id = list(eos_token_ids)
    model.generation_config.pad_token_id = PAD
    return _as_dtype(model, dtype)


def small_reward(
    family: Family = "llama", *, seed: int, vocabulary: int, dtype: torch.dtype = torch.float64, **shape: object
) -> PreTrainedModel:
    """A random classifier with one label."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = small_config(family, vocabulary=vocabulary, num_labels=1, **shape)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return _as_dtype(model, dtype)


def scripted_policy(logits: Tensor, *, eos_token_ids: tuple[int, ...] = (END_OF_TURN,)) -> PreTrainedModel:
    """A fp64 Llama that reads its last token alone: the next token's logits are that row of `logits[V, V]`."""
    vocabulary = len(logits)
    model = LlamaForCausalLM(_one_hot_config(vocabulary)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(vocabulary))
        model.model.norm.weight.fill_(1.0)
    model = _as_dtype(model, torch.float64)
    # The last norm takes one-hot rows to this length.
    with torch.no_grad():
        length = model.model.norm(torch.eye(vocabulary, dtype=torch.float64))[0, 0]
        model.lm_head.weight.copy_(logits.T / length)
    model.generation_config.eos_token_id = list(eos_token_ids)
    model.generation_config.pad_token_id = PAD
    return model


def scripted_reward(values: Tensor) -> PreTrainedModel:
    """A fp64 Llama classifier that prefers sequences whose tokens have high `values[V]`.

    Attention averages one-hot rows over the sequence, so the reward is the mean value plus the last token's, up to a
    positive factor, and the gradient's score of a token that is not in the sequence has the sign of its value.
    """
    vocabulary = len(values)
    model = LlamaForSequenceClassification(_one_hot_config(vocabulary, num_labels=1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        identity = torch.eye(vocabulary)
        model.get_input_embeddings().weight.copy_(identity)
        layer = model.model.layers[0]
        layer.input_layernorm.weight.fill_(1.0)
        layer.self_attn.v_proj.weight.copy_(identity)
        layer.self_attn.o_proj.weight.copy_(identity)
        model.model.norm.weight.fill_(1.0)
        model.score.weight.copy_(values)
    return _as_dtype(model, torch.float64)


def _one_hot_config(vocabulary: int, **changes: object) -> LlamaConfig:
    if vocabulary % 2:
        raise ValueError(f"vocabulary is {vocabulary}, but the head size of a rotary embedding is even")
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=vocabulary,
        head_dim=vocabulary,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=BEGIN_OF_TEXT,
        eos_token_id=END_OF_TURN,
        pad_token_id=PAD,
        **changes,
    )


class _ExactRMSNorm(nn.Module):
    """transformers' norms round to fp32 whatever the model's dtype; this one stays in fp64."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        self.weight = norm.weight
        self.offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return hidden_states * torch.rsqrt(variance + self.eps) * (self.weight + self.offset)


def _as_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model = model.to(dtype).eval().requires_grad_(False)
    if dtype is torch.float64:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__.endswith("RMSNorm"):
                    setattr(parent, name, _ExactRMSNorm(child))
    return model
