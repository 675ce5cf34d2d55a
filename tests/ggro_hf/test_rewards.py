"""The reward model's fast path: loading, refusals, cached scores and gradients against plain HuggingFace."""

import pytest
import torch
from safetensors import SafetensorError
from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

from ggro_hf import GGRO, RewardModel
from ggro_hf.results import Counters
from ggro_hf.rewards import RewardPrefix
from ggro_hf.vocabulary import check_shared_vocabulary
from tests.ggro_hf.small_models import FAMILIES, PAD, small_config, small_policy, small_reward, small_tokenizer

VOCABULARY = 61
PREFIX, SEGMENT = [5, 9, 33, 7, 12, 40, 3, 8, 21, 60], [11, 50, 4, 17, 29]


def plain_reward(model, token_ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids])).logits[0, 0].item()


@pytest.mark.parametrize("family", FAMILIES)
def test_score_equals_the_classifier(family):
    model = small_reward(family, seed=2, vocabulary=VOCABULARY)
    expected = plain_reward(model, PREFIX + SEGMENT)
    assert RewardModel(model).score(PREFIX + SEGMENT) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_after_a_cached_prefix_equals_autograd_over_everything(family):
    model = small_reward(family, seed=4, vocabulary=VOCABULARY)
    reward = RewardModel(model)
    prefix = RewardPrefix(reward, Counters())
    prefix.extend(list(PREFIX))
    scored = prefix.score(SEGMENT, gradient_tokens=len(SEGMENT))

    embeddings = model.get_input_embeddings()(torch.tensor([PREFIX + SEGMENT])).detach().requires_grad_(True)
    plain = model.score(model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0, -1])[0]
    (gradient,) = torch.autograd.grad(plain, embeddings)
    assert scored.reward == pytest.approx(plain.item(), abs=1e-10)
    torch.testing.assert_close(scored.gradient, gradient[0, len(PREFIX) :], rtol=0, atol=1e-10)


def test_a_committed_segment_serves_as_prefix_without_being_computed_again():
    model = small_reward("mistral", seed=5, vocabulary=VOCABULARY)
    counters = Counters()
    prefix = RewardPrefix(RewardModel(model), counters)
    prefix.extend(list(PREFIX))
    first = prefix.score(SEGMENT, gradient_tokens=1)
    layers = prefix.read(first.place)
    prefix.score([1, 2], gradient_tokens=1)
    prefix.commit(SEGMENT, first.reward, layers)
    assert prefix.reward == first.reward
    assert prefix.score([]).reward == first.reward
    assert prefix.score([30, 31]).reward == pytest.approx(plain_reward(model, [*PREFIX, *SEGMENT, 30, 31]), abs=1e-10)
    assert counters.reward_forward_tokens == len(PREFIX) + len(SEGMENT) + 2 + 2
    assert counters.reward_backward_tokens == len(SEGMENT) + 2


def test_scores_inside_inference_mode():
    model = small_reward(seed=6, vocabulary=VOCABULARY)
    with torch.inference_mode():
        prefix = RewardPrefix(RewardModel(model), Counters())
        prefix.extend(list(PREFIX))
        assert prefix.score(SEGMENT, gradient_tokens=2).gradient.shape == (2, 32)


def test_a_pad_token_at_the_end_does_not_move_the_pooling():
    model = small_reward(seed=7, vocabulary=VOCABULARY)
    assert RewardModel(model).score([*PREFIX, PAD]) != pytest.approx(plain_reward(model, PREFIX), abs=1e-6)


def test_from_pretrained_takes_head_tokenizer_and_dtype(tmp_path):
    model = small_reward(seed=8, vocabulary=VOCABULARY, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    reward = RewardModel.from_pretrained(tmp_path)
    assert reward.score(PREFIX) == pytest.approx(plain_reward(model, PREFIX), abs=1e-5)
    assert reward.tokenizer is not None
    assert RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    small_policy(seed=0, vocabulary=VOCABULARY, dtype=torch.float32, num_labels=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the weights score\.weight"):
        RewardModel.from_pretrained(tmp_path)


def test_two_labels_are_refused(tmp_path):
    model = LlamaForSequenceClassification(small_config("llama", vocabulary=VOCABULARY, num_labels=2))
    with pytest.raises(ValueError, match="2 labels"):
        RewardModel(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 labels"):
        RewardModel.from_pretrained(tmp_path)


def test_an_encoder_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=1,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification.*causal"):
        RewardModel(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification.*causal"):
        RewardModel.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_refused():
    model = small_reward(seed=9, vocabulary=VOCABULARY)
    model.score.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        RewardModel(model)


def test_missing_and_truncated_files_say_so(tmp_path):
    with pytest.raises(OSError):
        RewardModel.from_pretrained(tmp_path / "nowhere")
    small_reward(seed=8, vocabulary=VOCABULARY, dtype=torch.float32).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SafetensorError, match="incomplete"):
        RewardModel.from_pretrained(tmp_path)


class Vocabulary:
    """The part of a tokenizer that the check reads."""

    def __init__(self, tokens):
        self.tokens = tokens

    def get_vocab(self):
        return self.tokens


def test_one_moved_token_among_many_is_found():
    policy = {f"t{index}": index for index in range(5000)}
    reward = dict(policy)
    reward["t4321"], reward["t4322"] = 4322, 4321
    with pytest.raises(ValueError, match=r"2 of 5000 tokens differ.*'t4321' \(policy id 4321, reward id 4322\)"):
        check_shared_vocabulary(Vocabulary(policy), Vocabulary(reward), 5000)


def test_more_reward_tokens_are_fine_but_too_few_rows_are_not():
    policy = {f"t{index}": index for index in range(100)}
    check_shared_vocabulary(Vocabulary(policy), Vocabulary(policy | {"[PAD]": 100}), 101)
    with pytest.raises(ValueError, match=r"reach id 99.*has 90 rows"):
        check_shared_vocabulary(Vocabulary(policy), Vocabulary(policy), 90)


def test_a_decoder_refuses_another_vocabulary():
    reward = RewardModel(small_reward(seed=1, vocabulary=400), Vocabulary({"a": 0, "b": 1}))
    with pytest.raises(ValueError, match="do not share a vocabulary"):
        GGRO(reward, tokenizer=small_tokenizer())
