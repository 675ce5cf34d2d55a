"""Preference pairs and reward models for the tests of training, small and always the same."""

import random
from collections.abc import Iterable

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from ggro_hf.pairs import PartialPair, PreferencePair
from ggro_hf.training.weights import WeighedPair
from tests.ggro_hf.small_models import small_reward

VOCABULARY = 300
_WORDS = ["the", "cat", "and", "then", "a", "stone", "was", "in\nthere", "again,", "é", "seen"]


def preference_pairs(count: int, seed: int = 0) -> list[PreferencePair]:
    """Responses of 3 to 12 words; the chosen ones have more cats."""
    draws = random.Random(seed)
    pairs = []
    for row in range(1, count + 1):
        chosen, rejected = (
            " " + " ".join(draws.choice(words) for _ in range(draws.randint(3, 12)))
            for words in (["cat", *_WORDS], _WORDS[2:])
        )
        pairs.append(PreferencePair(row, draws.choice(["Tell me", "Who is", "Once there"]), chosen, rejected))
    return pairs


def weighed_pairs(count: int, lengths: tuple[int | None, ...] = (1, 3, 7, None), seed: int = 0) -> list[WeighedPair]:
    """Pairs compared at these lengths, with weights from 1 on."""
    return [
        WeighedPair(PartialPair(pair, lengths), tuple(1.0 + 0.5 * (pair.row % 3) + i for i in range(len(lengths))))
        for pair in preference_pairs(count, seed)
    ]


def causal_classifier(family: str = "llama", seed: int = 1) -> PreTrainedModel:
    """A random causal reward model in fp32."""
    model = small_reward(family, seed=seed, vocabulary=VOCABULARY, dtype=torch.float32)  # type: ignore[arg-type]
    return model.requires_grad_(True)


def encoder_classifier(tokenizer: PreTrainedTokenizerFast, seed: int = 1) -> PreTrainedModel:
    """A random encoder as a reward model, without dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )
        return BertForSequenceClassification(config)


def partial_pairs(rows: Iterable[int] = range(1, 12)) -> list[PartialPair]:
    """Pairs whose responses and lengths follow from their row."""
    lengths: list[tuple[int | None, ...]] = [(1, 3, None), (2,), (1, 2, 3, 4, 5, None)]
    return [
        PartialPair(
            PreferencePair(
                row, f"where is otter {row}", "in the sea and on the rest" + " er" * (row % 4), f"an end {row}"
            ),
            lengths[row % 3],
        )
        for row in rows
    ]
