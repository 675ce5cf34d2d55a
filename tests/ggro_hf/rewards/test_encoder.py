"""Encoders as rewards, loaded as checkpoints are, against a plain forward of every text."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, DebertaV2Model

from ggro_hf.results import Counters
from ggro_hf.rewards.encoder import EncoderReward
from ggro_hf.rewards.formats import Dialogue
from tests.ggro_hf.rewards.text_models import (
    conversation,
    encoder_tokenizer,
    save_causal,
    save_encoder,
    small_encoder,
)
from tests.ggro_hf.small_models import END_OF_TURN, small_tokenizer

POLICY = small_tokenizer()
ANSWERS = ["the end is there", "", "and", "an otter in the sea, over the rest of it!!!! !!", "ö", "the end is there"]


def ids(text):
    return POLICY(text)["input_ids"]


def plain(reward, *texts):
    with torch.no_grad():
        # In lists, because transformers takes an empty second text for none where it is given alone.
        return reward.model(**reward.tokenizer(*[[text] for text in texts], return_tensors="pt")).logits[0, 0].item()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    save_encoder(path)
    return path


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_rewards_equal_single_forwards(directory, batch_size):
    reward = EncoderReward.from_pretrained(directory, batch_size=batch_size)
    counters = Counters()
    scoring = reward.open(conversation("where is it"), counters, 20)
    (rewards,) = scoring.score([[ids(answer) for answer in ANSWERS]])
    assert rewards == pytest.approx([plain(reward, "where is it", answer) for answer in ANSWERS], abs=1e-5)
    assert len(set(rewards)) == 5
    assert max(rewards) - min(rewards) > 0.1
    lengths = sorted(map(len, reward.tokenizer(["where is it"] * 5, ANSWERS[:5])["input_ids"]))
    batches = [lengths[start : start + batch_size] for start in range(0, 5, batch_size)]
    assert counters.reward_forward_tokens == sum(max(batch) * len(batch) for batch in batches)


def test_sequences_go_on_and_what_is_known_is_not_computed_again(directory):
    reward = EncoderReward.from_pretrained(directory)
    counters = Counters()
    scoring = reward.open(conversation("who"), counters, 20)
    scoring.score([[ids("the"), ids("an"), ids("res")]])
    scoring.keep([(0, 1), (0, 0), (0, 1)])
    before = counters.reward_forward_tokens
    ((known,), _, _) = scoring.score([[[]], [], []])
    assert counters.reward_forward_tokens == before
    assert known == pytest.approx(plain(reward, "who", "an"), abs=1e-5)
    rewards = scoring.score([[ids("d"), [END_OF_TURN]], [ids("re")], [ids("d")]])
    expected = [[plain(reward, "who", "and"), known], [plain(reward, "who", "there")], [plain(reward, "who", "and")]]
    for got, wanted in zip(rewards, expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-5)


def test_another_format_and_messages(directory):
    reward = EncoderReward.from_pretrained(directory, format=Dialogue())
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text = "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: the"
    assert reward.score_response(conversation(messages), ids("the")) == pytest.approx(plain(reward, text), abs=1e-5)


def test_token_types_reach_the_model():
    tokenizer = encoder_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        reward = EncoderReward(BertForSequenceClassification(config), tokenizer)
    (rewards,) = reward.open(conversation("who"), Counters(), 9).score([[ids("the other"), ids("the")]])
    assert rewards == pytest.approx([plain(reward, "who", "the other"), plain(reward, "who", "the")], abs=1e-5)
    assert 1 in tokenizer("who", "the")["token_type_ids"]


def test_a_prompt_that_does_not_fit_is_named_before_and_a_response_when_it_is_scored():
    tokenizer = encoder_tokenizer(max_length=24)
    reward = EncoderReward(small_encoder(tokenizer), tokenizer)
    assert reward.capabilities.max_tokens == 24
    with pytest.raises(ValueError, match=r"prompt alone takes \d+ tokens of the reward model, whose context has 24"):
        reward.open(conversation("z" * 30), Counters(), 1)
    scoring = reward.open(conversation("z" * 10), Counters(), 30)
    scoring.score([[ids("q" * 11)]])
    with pytest.raises(ValueError, match=r"take 25 tokens .* has 24, at continuation 1 of sequence 0, the text 'qqq"):
        scoring.score([[ids("q"), ids("q" * 12)]])


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    tokenizer = encoder_tokenizer()
    model = small_encoder(tokenizer)
    bare = DebertaV2Model(model.config)
    bare.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the weights classifier\.bias"):
        EncoderReward.from_pretrained(tmp_path)


def test_models_that_are_no_encoder_with_one_label_are_refused(tmp_path):
    save_causal(tmp_path / "causal")
    with pytest.raises(ValueError, match=r"Gemma3.* causal; use TextReward"):
        EncoderReward.from_pretrained(tmp_path / "causal")
    save_encoder(tmp_path / "three", num_labels=3)
    with pytest.raises(ValueError, match="3 labels"):
        EncoderReward.from_pretrained(tmp_path / "three")
    tokenizer = encoder_tokenizer()
    with pytest.raises(ValueError, match="3 labels"):
        EncoderReward(small_encoder(tokenizer, num_labels=3), tokenizer)
    with pytest.raises(ValueError, match="batch_size is 0"):
        EncoderReward(small_encoder(tokenizer), tokenizer, batch_size=0)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        EncoderReward(small_encoder(encoder_tokenizer()), tokenizer)


def test_the_parameters_are_frozen_and_gradients_off(directory):
    reward = EncoderReward.from_pretrained(directory, dtype=torch.float64)
    assert reward.model.dtype is torch.float64
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())
    assert not reward.model.training
