"""What a checkpoint is taken for, and that it scores as the class made by hand does."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from ggro_hf.rewards import EncoderReward, HeadReward, LoadedBackbone, RewardModel, TextReward, describe, load_reward
from tests.ggro_hf.rewards.head_models import VOCABULARY, checkpoint, gated, rewrite_config, two_layers
from tests.ggro_hf.rewards.text_models import (
    conversation,
    encoder_tokenizer,
    gemma_like_tokenizer,
    save_causal,
    save_encoder,
)
from tests.ggro_hf.small_models import FAMILIES, small_policy, small_reward, small_tokenizer

POLICY = small_tokenizer()
RESPONSES = [[40, 41], [60], [], [40, 72, 91]]


def save(directory, model, tokenizer=None):
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def value_head():
    return two_layers(torch.Generator().manual_seed(5), "v_head.summary")


def assert_same_rewards(reward, by_hand, policy=POLICY):
    assert type(reward) is type(by_hand)
    got, expected = (
        [one.score_response(conversation("where is it", policy), response) for response in RESPONSES]
        for one in (reward, by_hand)
    )
    assert got == expected
    assert len(set(got)) == len(RESPONSES)


def test_an_encoder(tmp_path):
    save_encoder(tmp_path)
    reward = load_reward(tmp_path, POLICY)
    assert_same_rewards(reward, EncoderReward.from_pretrained(tmp_path))
    assert describe(reward) == "EncoderReward reads text; every candidate is computed whole"
    # One with the policy's tokenizer reads both directions all the same.
    other = encoder_tokenizer()
    assert isinstance(load_reward(tmp_path, other), EncoderReward)


def test_an_encoder_whose_head_has_other_layers(tmp_path):
    tokenizer = encoder_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=32, n_layers=1, n_heads=2, num_labels=1, initializer_range=0.5
    )
    save(tmp_path, DistilBertForSequenceClassification(config), tokenizer)
    assert "pre_classifier.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_rewards(load_reward(tmp_path, POLICY), EncoderReward.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_on_the_policys_vocabulary(tmp_path, family):
    save(tmp_path, small_reward(family, seed=1, vocabulary=VOCABULARY, dtype=torch.float32), small_tokenizer())
    reward = load_reward(tmp_path, POLICY)
    assert_same_rewards(reward, RewardModel.from_pretrained(tmp_path))
    assert describe(reward) == "RewardModel reads the policy's token ids; candidates of one prefix go through one pass"


def test_a_classifier_with_one_more_token_for_padding(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert len(tokenizer) == len(POLICY) + 1
    save(tmp_path, small_reward(seed=1, vocabulary=len(tokenizer), dtype=torch.float32), tokenizer)
    assert_same_rewards(load_reward(tmp_path, POLICY), RewardModel.from_pretrained(tmp_path))


def test_a_classifier_with_a_table_too_small_for_the_policy_reads_text(tmp_path):
    tokenizer = small_tokenizer()
    save(tmp_path, small_reward(seed=1, vocabulary=len(tokenizer), dtype=torch.float32), tokenizer)
    policy = small_tokenizer()
    policy.add_tokens(["more"])
    assert_same_rewards(load_reward(tmp_path, policy), TextReward.from_pretrained(tmp_path), policy)


def test_a_classifier_of_another_naming(tmp_path):
    settings = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3, "initializer_range": 0.3}
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, num_labels=1, **settings)
    torch.manual_seed(0)
    save(tmp_path, GPT2ForSequenceClassification(config), small_tokenizer())
    assert_same_rewards(load_reward(tmp_path, POLICY), RewardModel.from_pretrained(tmp_path))
    other = gemma_like_tokenizer()
    assert_same_rewards(load_reward(tmp_path, other), TextReward.from_pretrained(tmp_path), other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_with_another_tokenizer(tmp_path, family):
    save_causal(tmp_path, family=family)
    reward = load_reward(tmp_path, POLICY)
    assert_same_rewards(reward, TextReward.from_pretrained(tmp_path))
    assert describe(reward) == "TextReward reads text; candidates of one prefix go through one pass"


def test_a_value_head_with_the_policys_tokenizer_or_another(tmp_path):
    for name, tokenizer in (("shared", small_tokenizer()), ("other", gemma_like_tokenizer()), ("none", None)):
        checkpoint(tmp_path / name, value_head(), tokenizer=tokenizer)
    assert_same_rewards(load_reward(tmp_path / "shared", POLICY), HeadReward.from_pretrained(tmp_path / "shared"))
    assert_same_rewards(load_reward(tmp_path / "none", POLICY), HeadReward.from_pretrained(tmp_path / "none"))
    other = LoadedBackbone.from_pretrained(tmp_path / "other")
    by_hand = TextReward(other.model, other.tokenizer, head=other.head)
    assert_same_rewards(load_reward(tmp_path / "other", POLICY), by_hand)


def test_a_gate_with_another_tokenizer(tmp_path):
    template = "{% for m in messages %}{{ m.content }}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    tokenizer = gemma_like_tokenizer(template + "{% endfor %}")
    checkpoint(tmp_path, gated(torch.Generator().manual_seed(5)), tokenizer=tokenizer)
    backbone = LoadedBackbone.from_pretrained(tmp_path)
    assert_same_rewards(
        load_reward(tmp_path, POLICY), TextReward(backbone.model, backbone.tokenizer, head=backbone.head)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_without_a_tokenizer_is_taken_to_share_the_ids(tmp_path, family):
    # For some families transformers makes up a tokenizer that has special tokens only.
    save(tmp_path, small_reward(family, seed=1, vocabulary=VOCABULARY, dtype=torch.float32))
    assert_same_rewards(load_reward(tmp_path, POLICY), RewardModel.from_pretrained(tmp_path))


def test_a_score_of_several_layers_and_what_training_left(tmp_path):
    score = two_layers(torch.Generator().manual_seed(5), "score")
    classifier = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    checkpoint(tmp_path / "layers", score, tokenizer=small_tokenizer(), config=classifier)
    assert_same_rewards(load_reward(tmp_path / "layers", POLICY), HeadReward.from_pretrained(tmp_path / "layers"))
    both = {"score.weight": torch.randn(1, 32, generator=torch.Generator().manual_seed(1)), **value_head()}
    checkpoint(tmp_path / "both", both, tokenizer=small_tokenizer(), config=classifier)
    assert_same_rewards(load_reward(tmp_path / "both", POLICY), RewardModel.from_pretrained(tmp_path / "both"))


def test_dtype_and_device(tmp_path):
    save(tmp_path, small_reward(seed=1, vocabulary=VOCABULARY, dtype=torch.float32), small_tokenizer())
    reward = load_reward(tmp_path, POLICY, dtype=torch.bfloat16, device="cpu")
    assert reward.model.dtype is torch.bfloat16


def test_what_cannot_be_a_reward_is_refused(tmp_path):
    save(tmp_path / "policy", small_policy(seed=0, vocabulary=VOCABULARY, dtype=torch.float32), small_tokenizer())
    with pytest.raises(ValueError, match=r"policy': reward model lacks the weights of a head .*v_head"):
        load_reward(tmp_path / "policy", POLICY)

    torch.manual_seed(0)
    save(tmp_path / "two", small_reward(seed=1, vocabulary=VOCABULARY, dtype=torch.float32), small_tokenizer())
    rewrite_config(tmp_path / "two", num_labels=2)
    with pytest.raises(ValueError, match="two' has 2 labels"):
        load_reward(tmp_path / "two", POLICY)
    checkpoint(tmp_path / "values", two_layers(torch.Generator(), "v_head.summary", outputs=2))
    with pytest.raises(ValueError, match="2 outputs, but only 1"):
        load_reward(tmp_path / "values", POLICY)

    checkpoint(tmp_path / "headless", {}, config={"architectures": ["LlamaForSequenceClassification"], "num_labels": 1})
    with pytest.raises(ValueError, match=r"headless' lacks the weights score\.weight"):
        load_reward(tmp_path / "headless", POLICY)
    save_encoder(tmp_path / "mute")
    for file in (tmp_path / "mute").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="mute' comes without a tokenizer"):
        load_reward(tmp_path / "mute", POLICY)


def test_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(OSError, match="nowhere': there is no such directory"):
        load_reward(tmp_path / "nowhere", POLICY)
    model = small_reward(seed=1, vocabulary=VOCABULARY, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"has no model\.safetensors; convert its weights"):
        load_reward(tmp_path, POLICY)
