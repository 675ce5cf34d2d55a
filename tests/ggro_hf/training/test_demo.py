"""The demo recipe on generated reviews: it learns, survives a kill, and measures what plain transformers computes."""

import gzip
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from ggro_hf.cli import main
from ggro_hf.training.demo.data import (
    Review,
    ReviewStream,
    RewardBatches,
    clean_text,
    encode_reviews,
    read_reviews,
    train_tokenizer,
)
from ggro_hf.training.demo.loop import CAUSAL_ATTENTION, trapezoid
from ggro_hf.training.demo.models import DemoRecipe, train_demo
from ggro_hf.training.demo.policy import PolicyRecipe, held_out_perplexity, policy_config, train_policy
from ggro_hf.training.demo.reward import (
    RewardRecipe,
    held_out_accuracy,
    position_weights,
    prefix_loss,
    reward_from_policy,
    train_reward,
)

POLICY = PolicyRecipe(
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    attention_heads=2,
    key_value_heads=1,
    context=64,
    steps=30,
    warmup=3,
    decay=10,
    tokens_per_step=256,
    early_row_length=16,
    row_length=32,
    long_row_steps=8,
)
REWARD = RewardRecipe(
    layers=1,
    epochs=8,
    tokens_per_step=256,
    row_lengths=(16, 32),
    first_position=4,
    matrix_lr=1e-2,
    other_lr=1e-2,
    warmup=2,
)
RECIPE = DemoRecipe(vocab_size=320, policy=POLICY, reward=REWARD, compiled=False)


def generated_reviews(count: int, seed: int) -> list[Review]:
    generator = random.Random(seed)
    words = {1: ["wonderful", "moving", "superb"], 0: ["dreadful", "boring", "awful"]}
    reviews = []
    for number in range(count):
        label = number % 2
        parts = [
            f"the {generator.choice(['plot', 'cast', 'music', 'ending'])} was {generator.choice(words[label])}"
            for _ in range(generator.randint(1, 5))
        ]
        reviews.append(Review(". ".join(parts) + ".", label))
    return reviews


def write_reviews(path: Path, reviews: list[Review]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": review.text, "label": review.label}) + "\n" for review in reviews)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([review.text for review in generated_reviews(80, 0)], 320, 64)


@pytest.fixture(scope="module")
def policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(policy_config(POLICY, tokenizer)).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reviews")
    write_reviews(directory / "train.jsonl.gz", generated_reviews(80, 0))
    write_reviews(directory / "val.jsonl.gz", generated_reviews(20, 1))
    return directory


def test_whole_recipe(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    report = train_demo(data, output, tmp_path / "work", recipe=RECIPE)

    # The generated text has at most log2(7) bits of choice in each sentence of some ten tokens.
    assert report.perplexity < 40 < RECIPE.vocab_size
    assert report.accuracy["reward"]["512"] >= 0.9
    assert report.accuracy["gold"]["512"] >= 0.9
    assert not (output / "policy" / "model.safetensors").read_bytes().count(b"lm_head")
    assert report.stored_bytes == sum(
        path.stat().st_size for path in output.rglob("*") if path.is_file() and path.name != "README.md"
    )

    texts = [review.text for review in read_reviews(data / "val.jsonl.gz")]
    tokenizer = AutoTokenizer.from_pretrained(output / "policy")
    model, info = LlamaForCausalLM.from_pretrained(output / "policy", output_loading_info=True)
    assert model.dtype == torch.float32
    assert not info["missing_keys"] and not info["unexpected_keys"]
    losses = [
        model(**encoded, labels=encoded["input_ids"]).loss.item()
        for encoded in (tokenizer(text + "<|end|>", return_tensors="pt") for text in texts)
    ]
    tokens = [len(tokenizer(text + "<|end|>")["input_ids"]) - 1 for text in texts]
    assert report.perplexity == pytest.approx(math.exp(np.average(losses, weights=tokens)), rel=1e-4)
    for name in ("reward", "gold"):
        reward = LlamaForSequenceClassification.from_pretrained(output / name)
        assert reward.config.num_labels == 1 and reward.config.pad_token_id == tokenizer.pad_token_id
        assert AutoTokenizer.from_pretrained(output / name).get_vocab() == tokenizer.get_vocab()
        right = [
            (reward(**tokenizer(text, return_tensors="pt")).logits.item() > 0) == (number % 2 == 1)
            for number, text in enumerate(texts)
        ]
        assert report.accuracy[name]["512"] == pytest.approx(np.mean(right))
        assert f"{100 * report.accuracy[name]['160']:.1f} %" in (output / name / "README.md").read_text()
    assert f"{report.perplexity:.2f}" in (output / "policy" / "README.md").read_text()
    assert not torch.equal(
        *(trained_weights(tmp_path / "work" / f"{name}.pt")["score.weight"] for name in ("reward", "gold"))
    )


def trained_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["model"]


class Killed(Exception):
    pass


def killed_at(method, step: int):
    def until_killed(self, number: int, *args):
        if number == step:
            raise Killed
        return method(self, number, *args)

    return until_killed


def test_killed_policy_continues(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = encode_reviews(tokenizer, generated_reviews(80, 0))

    def train(checkpoint: Path) -> dict[str, torch.Tensor]:
        return train_policy(POLICY, tokenizer, sequences, 0, False, checkpoint, "same", 4)[0].state_dict()

    expected = train(tmp_path / "straight.pt")
    for step in (6, 21):
        with monkeypatch.context() as patch:
            patch.setattr(ReviewStream, "step", killed_at(ReviewStream.step, step))
            with pytest.raises(Killed):
                train(tmp_path / "killed.pt")
        # A kill in the middle of writing leaves a torn partial file beside the last whole checkpoint.
        (tmp_path / "killed.partial").write_bytes(b"torn")
    for name, weight in train(tmp_path / "killed.pt").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="other settings"):
        train_policy(POLICY, tokenizer, sequences, 0, False, tmp_path / "killed.pt", "other", 4)


def test_killed_reward_continues(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reviews = generated_reviews(40, 0)
    labels = [review.label for review in reviews]
    sequences = encode_reviews(tokenizer, reviews)

    def train(checkpoint: Path) -> dict[str, torch.Tensor]:
        model, _ = train_reward(
            "reward", REWARD, policy, tokenizer, sequences, labels, 0, False, checkpoint, "same", 3, 0
        )
        return model.state_dict()

    expected = train(tmp_path / "straight.pt")
    with monkeypatch.context() as patch:
        patch.setattr(RewardBatches, "step", killed_at(RewardBatches.step, 7))
        with pytest.raises(Killed):
            train(tmp_path / "killed.pt")
    for name, weight in train(tmp_path / "killed.pt").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)


def test_stream_covers_every_epoch(tokenizer: PreTrainedTokenizerFast) -> None:
    sequences = encode_reviews(tokenizer, generated_reviews(30, 0))
    stream = ReviewStream(sequences, tokens_per_step=64, seed=3)
    steps = 2 * stream.tokens_per_epoch // 64
    rows = [stream.step(step, 16) for step in range(steps)]
    inputs = torch.cat([ids.flatten() for ids, _ in rows])
    targets = torch.cat([ids.flatten() for _, ids in rows])
    assert torch.equal(inputs[1:], targets[:-1])
    first = inputs[: stream.tokens_per_epoch].bincount(minlength=320)
    assert first.tolist() == np.bincount(np.concatenate(sequences), minlength=320).tolist()
    fresh = ReviewStream(sequences, tokens_per_step=64, seed=3)
    assert torch.equal(fresh.step(steps - 1, 16)[0], rows[-1][0])


def test_reward_batches_are_excerpts(tokenizer: PreTrainedTokenizerFast) -> None:
    reviews = generated_reviews(50, 0)
    sequences = encode_reviews(tokenizer, reviews)
    sources = [" ".join(map(str, sequence)) for sequence in sequences]
    batches = RewardBatches(sequences, [review.label for review in reviews], (16, 32), 128, 0.5, tokenizer, 0)
    seen, ends = set(), set()
    for step in range(2 * batches.steps_per_epoch):
        ids, lengths, labels = batches.step(step)
        assert ids.shape in ((8, 16), (4, 32))
        for row, length, label in zip(ids.tolist(), lengths.tolist(), labels.tolist(), strict=True):
            assert row[0] == tokenizer.bos_token_id
            assert set(row[length:]) <= {tokenizer.pad_token_id}
            body = " ".join(map(str, row[1:length]))
            matches = [number for number, source in enumerate(sources) if body in source]
            assert any(reviews[number].label == label for number in matches)
            seen.update(matches)
            ends.add(row[length - 1] == tokenizer.eos_token_id)
    assert seen == set(range(50)) and ends == {True, False}


def test_loss_is_the_weighted_mean_of_prefix_losses() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 9, dtype=torch.float64)
    lengths = torch.tensor([9, 3])
    weights = position_weights(lengths, 9, replace(REWARD, first_position=4, last_weight=0.25))
    assert weights[0].tolist() == pytest.approx([0, 0, 0, 0, 0.15, 0.15, 0.15, 0.15, 0.4])
    assert weights[1].tolist() == pytest.approx([0, 0, 1, 0, 0, 0, 0, 0, 0])
    positive = -nn.functional.logsigmoid(scores[0])
    negative = -nn.functional.logsigmoid(-scores[1])
    expected = (0.75 * positive[4:].mean() + 0.25 * positive[8] + negative[2]) / 2
    torch.testing.assert_close(prefix_loss(scores, torch.tensor([1.0, 0.0]), weights), expected, check_dtype=False)


def test_accuracy_and_perplexity_equal_plain_transformers(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    reviews = generated_reviews(40, 2)
    labels = [review.label for review in reviews]
    sequences = encode_reviews(tokenizer, reviews)
    torch.manual_seed(1)
    reward = reward_from_policy(policy, 1).eval()
    nn.init.normal_(reward.score.weight)
    reward.set_attn_implementation("eager")
    accuracy = held_out_accuracy(reward, tokenizer, sequences, labels, (5, 20))
    for length in (5, 20):
        right = 0
        for sequence, label in zip(sequences, labels, strict=True):
            ids = torch.from_numpy(sequence[:-1][:length].astype(np.int64))[None]
            right += (reward(input_ids=ids).logits.item() > 0) == (label == 1)
        assert accuracy[str(length)] == pytest.approx(right / 40)
    assert 0.2 < accuracy["20"] < 0.8

    nats, count = 0.0, 0
    for sequence in sequences:
        ids = torch.from_numpy(sequence[:24].astype(np.int64))[None]
        nats += policy(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    perplexity, bits_per_byte = held_out_perplexity(policy, tokenizer, sequences, 24)
    assert perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert 0 < bits_per_byte < 16


def test_training_attention_equals_masked_attention(policy: LlamaForCausalLM) -> None:
    ids = torch.arange(40).view(2, 20)
    expected = policy(input_ids=ids).logits
    policy.set_attn_implementation(CAUSAL_ATTENTION)
    try:
        torch.testing.assert_close(policy(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    finally:
        policy.set_attn_implementation("sdpa")


@given(text=st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer(tokenizer.decode(ids[1:]))["input_ids"] == ids


def test_clean_text() -> None:
    assert clean_text("One.<br /><br />Two \x96 caf\xe9\x85<br/>") == "One.\n\nTwo – café…"


def test_schedule() -> None:
    rates = [trapezoid(step, 20, warmup=4, decay=10) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:11] == [1.0] * 7
    assert rates[11:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("line", ["{", '{"text": "a"}', '{"text": 3, "label": 1}', '{"text": "a", "label": 2}', "[]"])
def test_bad_line_is_named(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write('{"text": "a", "label": 1}\n' + line + "\n")
    assert main(["train-demo", "--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "train.jsonl.gz line 2" in capsys.readouterr().err


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-demo", "--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "train.jsonl.gz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
