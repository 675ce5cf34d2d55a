"""The whole recipe of the embedded demo models: tokenizer, three models, measurements and model cards."""

import hashlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ggro_hf.demo_models import PROMPTS
from ggro_hf.training.demo.cards import policy_card, reward_card
from ggro_hf.training.demo.data import Review, encode_reviews, read_reviews, train_tokenizer
from ggro_hf.training.demo.policy import PolicyRecipe, held_out_perplexity, train_policy
from ggro_hf.training.demo.reward import RewardRecipe, held_out_accuracy, train_reward


@dataclass(frozen=True)
class DemoRecipe:
    """Everything that decides the weights besides data and seed; the defaults made the shipped ones."""

    vocab_size: int = 4096
    policy: PolicyRecipe = field(default_factory=PolicyRecipe)
    reward: RewardRecipe = field(default_factory=RewardRecipe)
    compiled: bool = True


@dataclass(frozen=True)
class DemoReport:
    """Figures measured on the rounded weights, loaded back in float32 by plain transformers."""

    perplexity: float
    bits_per_byte: float
    accuracy: dict[str, dict[str, float]]
    seconds: dict[str, float]
    vocab_size: int
    parameters: dict[str, int]
    stored_bytes: int


PREFIX_LENGTHS = (16, 32, 64, 128, 160, 256, 512)


def train_demo(
    data: Path,
    output: Path,
    work_dir: Path,
    seed: int = 0,
    recipe: DemoRecipe | None = None,
    checkpoint_every: int = 100,
) -> DemoReport:
    """Train the demo models on `data` and write them to `output`/{policy,reward,gold}.

    `data` holds train.jsonl.gz and val.jsonl.gz, one `{"text", "label"}` per line. Checkpoints go to `work_dir`; a
    killed run continues from them and ends with the same weights.

    Raises:
        FileNotFoundError: a review file is missing.
        ValueError: a review file is malformed, or `work_dir` belongs to a run with other settings or data.
    """
    recipe = recipe or DemoRecipe()
    train = read_reviews(data / "train.jsonl.gz")
    held_out = read_reviews(data / "val.jsonl.gz")
    tokenizer = train_tokenizer([review.text for review in train], recipe.vocab_size, recipe.policy.context)
    sequences = encode_reviews(tokenizer, train)
    held_out_sequences = encode_reviews(tokenizer, held_out)

    policy_settings = [seed, recipe.compiled, asdict(recipe.policy), _digest(sequences)]
    policy, policy_seconds = train_policy(
        recipe.policy,
        tokenizer,
        sequences,
        seed,
        recipe.compiled,
        work_dir / "policy.pt",
        _fingerprint(policy_settings),
        checkpoint_every,
    )
    rewards = _train_rewards(
        recipe, policy, tokenizer, train, sequences, seed, work_dir, checkpoint_every, policy_settings
    )

    models: dict[str, PreTrainedModel] = {"policy": policy, **{name: model for name, (model, _) in rewards.items()}}
    for name, model in models.items():
        _export(model, tokenizer, output / name)

    row_length = recipe.policy.row_length
    stored_policy = LlamaForCausalLM.from_pretrained(output / "policy", dtype=torch.float32)
    perplexity, bits_per_byte = held_out_perplexity(stored_policy, tokenizer, held_out_sequences, row_length)
    labels = [review.label for review in held_out]
    report = DemoReport(
        perplexity=perplexity,
        bits_per_byte=bits_per_byte,
        accuracy={
            name: held_out_accuracy(
                LlamaForSequenceClassification.from_pretrained(output / name, dtype=torch.float32),
                tokenizer,
                held_out_sequences,
                labels,
                PREFIX_LENGTHS,
            )
            for name in rewards
        },
        seconds={"policy": policy_seconds, **{name: seconds for name, (_, seconds) in rewards.items()}},
        vocab_size=len(tokenizer),
        parameters={name: model.num_parameters() for name, model in models.items()},
        stored_bytes=sum(path.stat().st_size for name in models for path in (output / name).iterdir()),
    )
    sizes = {"train": len(train), "held_out": len(held_out), "tokens": sum(map(len, sequences))}
    (output / "policy" / "README.md").write_text(
        policy_card(recipe.policy, report, sizes, seed, sample_texts(stored_policy, tokenizer)), encoding="utf-8"
    )
    for name in rewards:
        (output / name / "README.md").write_text(
            reward_card(name, recipe.reward, report, sizes, seed), encoding="utf-8"
        )
    return report


@torch.inference_mode()
def sample_texts(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Two texts of at most 160 tokens, sampled at temperature 0.8 from the first two demo prompts."""
    length = min(160, policy.config.max_position_embeddings)
    torch.manual_seed(0)
    texts = []
    for prompt in PROMPTS[:2]:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = cast(Any, policy).generate(**inputs, do_sample=True, temperature=0.8, top_k=0, max_length=length)
        texts.append(str(tokenizer.decode(ids[0], skip_special_tokens=True)))
    return texts


def _train_rewards(
    recipe: DemoRecipe,
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train: list[Review],
    sequences: list[np.ndarray],
    seed: int,
    work_dir: Path,
    checkpoint_every: int,
    policy_settings: list[Any],
) -> dict[str, tuple[LlamaForSequenceClassification, float]]:
    """Reward and gold model on disjoint halves of the reviews, side by side in two processes."""
    half = len(train) // 2
    halves = {"reward": slice(0, half), "gold": slice(half, 2 * half)}
    # Two processes with half the threads each beat one after the other: matrices this small do not fill the threads.
    with ProcessPoolExecutor(
        max_workers=2,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(max(1, torch.get_num_threads() // 2),),
    ) as pool:
        futures = {
            name: pool.submit(
                train_reward,
                name,
                recipe.reward,
                policy,
                tokenizer,
                sequences[part],
                [review.label for review in train[part]],
                seed + 1 + number,
                recipe.compiled,
                work_dir / f"{name}.pt",
                _fingerprint([name, asdict(recipe.reward), *policy_settings]),
                checkpoint_every,
                number,
            )
            for number, (name, part) in enumerate(halves.items())
        }
        return {name: future.result() for name, future in futures.items()}


def _export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write rounded weights and tokenizer; the configuration keeps float32, so that a plain load computes in it."""
    model.set_attn_implementation("sdpa")
    weights = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    if isinstance(model, LlamaForCausalLM):
        config = model.config
        if config.tie_word_embeddings:
            # Rounding made a second copy of the one matrix.
            del weights["lm_head.weight"]
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)


def _digest(sequences: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(sequence.tobytes())
    return digest.hexdigest()


def _fingerprint(settings: list[Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
