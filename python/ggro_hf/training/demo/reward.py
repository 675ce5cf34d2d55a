"""The demo's reward and gold models: sentiment of a film review, scored at every prefix."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from ggro_hf.training.demo.data import RewardBatches
from ggro_hf.training.demo.loop import CAUSAL_ATTENTION, make_optimizers, train_resumably, trapezoid


@dataclass(frozen=True)
class RewardRecipe:
    """Shape and schedule of a reward model; it starts from the policy's embedding, first `layers` layers and norm.

    The loss of a review is `1 - last_weight` times the mean over its positions from `first_position` on, plus
    `last_weight` times the loss at its last position.
    """

    layers: int = 3
    epochs: int = 2
    tokens_per_step: int = 4096
    row_lengths: tuple[int, ...] = (128, 224, 352, 512)
    first_position: int = 8
    last_weight: float = 0.25
    end_probability: float = 0.5
    hide_probability: float = 0.1
    dropout: float = 0.1
    matrix_lr: float = 1e-2
    other_lr: float = 6e-3
    weight_decay: float = 0.1
    warmup: int = 50


def reward_from_policy(policy: LlamaForCausalLM, layers: int) -> LlamaForSequenceClassification:
    """A one-label classifier (float32) with the policy's embedding, first `layers` layers and final norm."""
    settings = policy.config.to_dict()
    # The classifier's own: its class name and, through them, the number of labels.
    for key in ("architectures", "id2label", "label2id"):
        settings.pop(key, None)
    settings |= {"num_hidden_layers": layers, "tie_word_embeddings": False}
    config = LlamaConfig.from_dict({**settings, "id2label": {0: "POSITIVE"}, "label2id": {"POSITIVE": 0}})
    model = LlamaForSequenceClassification._from_config(
        config, attn_implementation=CAUSAL_ATTENTION, dtype=torch.float32
    )
    weights = model.state_dict()
    model.load_state_dict({**weights, **{k: v for k, v in policy.state_dict().items() if k in weights}})
    return model


def prefix_loss(scores: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted binary cross-entropy of logits `[B, T]` against labels `[B]`; `weights[B, T]` sum to 1 in each row."""
    targets = labels[:, None].expand_as(scores)
    losses = nn.functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    return (losses * weights).sum(1).mean()


def position_weights(lengths: torch.Tensor, row_length: int, recipe: RewardRecipe) -> torch.Tensor:
    """Weight of every position in its review's loss, `[B, row_length]` float32; zero on padding."""
    positions = torch.arange(row_length)
    first = torch.minimum(torch.tensor(recipe.first_position), lengths - 1)
    dense = ((positions >= first[:, None]) & (positions < lengths[:, None])).float()
    weights = (1.0 - recipe.last_weight) * dense / dense.sum(1, keepdim=True)
    weights[torch.arange(len(lengths)), lengths - 1] += recipe.last_weight
    return weights


def train_reward(
    name: str,
    recipe: RewardRecipe,
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sequences: list[np.ndarray],
    labels: list[int],
    seed: int,
    compiled: bool,
    checkpoint: Path,
    fingerprint: str,
    checkpoint_every: int,
    progress_row: int,
) -> tuple[LlamaForSequenceClassification, float]:
    """Train on every prefix of the reviews; returns the model (float32) and the seconds it took over all restarts."""
    torch.manual_seed(seed)
    model = reward_from_policy(policy, recipe.layers)
    batches = RewardBatches(
        sequences, labels, recipe.row_lengths, recipe.tokens_per_step, recipe.end_probability, tokenizer, seed
    )
    steps = recipe.epochs * batches.steps_per_epoch

    def loss_of(ids: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            scores = model.score(nn.functional.dropout(hidden, recipe.dropout)).squeeze(-1)
        return prefix_loss(scores.float(), labels, weights)

    fast_loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def loss_of_step(step: int) -> torch.Tensor:
        torch.manual_seed(seed * 1_000_003 + step)
        ids, lengths, targets = batches.step(step)
        hidden = (torch.rand(ids.shape) < recipe.hide_probability) & (torch.arange(ids.shape[1]) > 0)
        ids = ids.masked_fill(hidden, tokenizer.pad_token_id)
        return fast_loss_of(ids, targets, position_weights(lengths, ids.shape[1], recipe))

    seconds = train_resumably(
        name,
        model,
        make_optimizers(model, recipe.matrix_lr, recipe.other_lr, recipe.weight_decay),
        loss_of_step,
        lambda step: trapezoid(step, steps, recipe.warmup, steps - recipe.warmup),
        steps,
        checkpoint,
        fingerprint,
        checkpoint_every,
        progress_row,
    )
    return model, seconds


@torch.inference_mode()
def held_out_accuracy(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    sequences: list[np.ndarray],
    labels: list[int],
    prefix_lengths: tuple[int, ...],
) -> dict[str, float]:
    """Share of reviews on the right side of zero, by prefix length in tokens (`<|begin|>` counted).

    A review shorter than the prefix length is scored at its last text token; `finished` adds `<|end|>` to the reviews
    that fit the longest prefix and scores there.
    """
    longest = max(prefix_lengths)
    right = {str(length): 0 for length in prefix_lengths}
    finished = finished_right = 0
    for indices, ids in _right_padded(sequences, longest, tokenizer.pad_token_id):
        # Causal attention: the score at a position is the score of the prefix that ends there.
        scores = model.score(model.model(input_ids=ids).last_hidden_state).squeeze(-1)
        positive = torch.tensor([labels[index] == 1 for index in indices])
        whole = torch.tensor([len(sequences[index]) for index in indices])
        rows = torch.arange(len(indices))
        for length in prefix_lengths:
            last = torch.minimum(whole - 1, torch.tensor(length)) - 1
            right[str(length)] += int(((scores[rows, last] > 0) == positive).sum())
        fits = whole <= longest
        at_end = scores[rows, (whole - 1).clamp(max=longest - 1)] > 0
        finished += int(fits.sum())
        finished_right += int(((at_end == positive) & fits).sum())
    accuracy = {length: count / len(sequences) for length, count in right.items()}
    return {**accuracy, "finished": finished_right / max(1, finished)}


def _right_padded(sequences: list[np.ndarray], length: int, pad: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    for start in range(0, len(order), 16):
        indices = order[start : start + 16]
        rows = [torch.from_numpy(sequences[index][:length].astype(np.int64)) for index in indices]
        yield indices, nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
