"""The demo policy: a small Llama language model of film reviews, trained from scratch."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ggro_hf.training.demo.data import ReviewStream
from ggro_hf.training.demo.loop import CAUSAL_ATTENTION, make_optimizers, train_resumably, trapezoid


@dataclass(frozen=True)
class PolicyRecipe:
    """Shape and schedule of the policy.

    Rows are `early_row_length` tokens long, and `row_length` in the last `long_row_steps` steps: shorter rows are a
    quarter faster, and the far positions are learnt while the rate falls.
    """

    hidden_size: int = 256
    intermediate_size: int = 640
    layers: int = 4
    attention_heads: int = 4
    key_value_heads: int = 2
    context: int = 1024
    steps: int = 2600
    warmup: int = 100
    decay: int = 1000
    tokens_per_step: int = 4096
    early_row_length: int = 256
    row_length: int = 512
    long_row_steps: int = 300
    matrix_lr: float = 6e-3
    other_lr: float = 4e-3
    weight_decay: float = 0.1


def policy_config(recipe: PolicyRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Configuration of the policy with the tokenizer's vocabulary and special tokens."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.attention_heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_policy(
    recipe: PolicyRecipe,
    tokenizer: PreTrainedTokenizerFast,
    sequences: list[np.ndarray],
    seed: int,
    compiled: bool,
    checkpoint: Path,
    fingerprint: str,
    checkpoint_every: int,
) -> tuple[LlamaForCausalLM, float]:
    """Next-token training on `sequences`; returns the model (float32) and the seconds it took over all restarts."""
    torch.manual_seed(seed)
    config = policy_config(recipe, tokenizer)
    model = LlamaForCausalLM._from_config(config, attn_implementation=CAUSAL_ATTENTION, dtype=torch.float32)
    stream = ReviewStream(sequences, recipe.tokens_per_step, seed)

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    fast_loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def loss_of_step(step: int) -> torch.Tensor:
        early = step < recipe.steps - recipe.long_row_steps
        return fast_loss_of(*stream.step(step, recipe.early_row_length if early else recipe.row_length))

    seconds = train_resumably(
        "policy",
        model,
        make_optimizers(model, recipe.matrix_lr, recipe.other_lr, recipe.weight_decay),
        loss_of_step,
        lambda step: trapezoid(step, recipe.steps, recipe.warmup, recipe.decay),
        recipe.steps,
        checkpoint,
        fingerprint,
        checkpoint_every,
    )
    return model, seconds


@torch.inference_mode()
def held_out_perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sequences: list[np.ndarray], length: int
) -> tuple[float, float]:
    """Perplexity per token and bits per UTF-8 byte of reviews cut to `length` tokens, `<|end|>` included."""
    nats, tokens, text_bytes = 0.0, 0, 0
    cut = sorted((sequence[:length] for sequence in sequences), key=len)
    for start in range(0, len(cut), 16):
        rows = [torch.from_numpy(row.astype(np.int64)) for row in cut[start : start + 16]]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        logits = model(input_ids=ids).logits[:, :-1].float()
        targets = ids[:, 1:].masked_fill(ids[:, 1:] == tokenizer.pad_token_id, -100)
        nats += nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        tokens += int((targets != -100).sum())
        text_bytes += sum(len(str(tokenizer.decode(row, skip_special_tokens=True)).encode()) for row in rows)
    return math.exp(nats / tokens), nats / math.log(2) / text_bytes
