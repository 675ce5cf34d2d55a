"""Rewards from heads of the registry over the policy's ids, against plain passes and the head by hand."""

import pytest
import torch
from transformers import BertConfig, BertModel

from ggro_hf import ARGS, generate
from ggro_hf.results import Counters
from ggro_hf.rewards.base import Conversation
from ggro_hf.rewards.head_reward import HeadReward
from ggro_hf.rewards.heads import FeedForward, LoadedBackbone
from tests.ggro_hf.rewards.head_models import VOCABULARY, WIDTH, checkpoint, gated, hidden_states, two_layers
from tests.ggro_hf.small_models import FAMILIES, small_policy, small_reward, small_tokenizer

TURN = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
PROMPT = [0, 41, 77, 130, 250, 12, 9, 33, 61, 18]


@pytest.fixture
def random():
    return torch.Generator().manual_seed(5)


def value_head(tensors, hidden):
    inner = (hidden @ tensors["v_head.summary.0.weight"].T + tensors["v_head.summary.0.bias"]).relu()
    return inner @ tensors["v_head.summary.2.weight"][0] + tensors["v_head.summary.2.bias"][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_several_sequences_over_several_rounds(tmp_path, random, family):
    tensors = {name: 0.3 * tensor for name, tensor in two_layers(random, "v_head.summary", inner=24).items()}
    backbone = checkpoint(tmp_path, tensors, family=family)
    scoring = HeadReward.from_pretrained(tmp_path).open(Conversation(PROMPT), Counters(), 32)

    def expected(response):
        hidden = hidden_states(backbone, PROMPT + response)[-1]
        return pytest.approx(value_head(tensors, hidden).item(), abs=2e-4)

    assert scoring.score([[[5, 6], [], [7], [5, 6]]]) == [
        [expected([5, 6]), expected([]), expected([7]), expected([5, 6])]
    ]
    scoring.keep([(0, 2), (0, 0), (0, 2)])
    rounds = [[[8], [9, 10]], [[]], [[11, 12, 13]]]
    assert scoring.score(rounds) == [
        [expected([7, 8]), expected([7, 9, 10])],
        [expected([5, 6])],
        [expected([7, 11, 12, 13])],
    ]
    scoring.keep([(2, 0)])
    assert scoring.score([[[14], []]]) == [[expected([7, 11, 12, 13, 14]), expected([7, 11, 12, 13])]]


def test_the_gate_of_the_prompt_is_that_of_every_continuation(tmp_path, random):
    tensors = gated(random)
    backbone = checkpoint(tmp_path, tensors, tokenizer=small_tokenizer())
    turn = small_tokenizer().encode(TURN, add_special_tokens=False)
    reward = HeadReward.from_pretrained(tmp_path)
    rewards = []
    for prompt in ([0, 40, 41, *turn], [0, 60, 61, 62, *turn]):
        scoring = reward.open(Conversation(prompt), Counters(), 32)
        # A response that has the turn's tokens itself does not move the gate.
        continuations = [[70], [70, 71], [72, *turn, 73]]
        got = scoring.score([continuations])[0]
        for continuation, value in zip(continuations, got, strict=True):
            hidden = hidden_states(backbone, prompt + continuation)
            gate = hidden[len(prompt) - len(turn)]
            for layer in range(4):
                gate = tensors[f"gating.layers.{layer}.weight"] @ gate + tensors[f"gating.layers.{layer}.bias"]
                gate = gate.relu() if layer < 3 else gate
            gate = (gate / 10).softmax(0) * tensors["gating.logit_scale"][0]
            objectives = tensors["regression_layer.weight"] @ hidden[-1] @ tensors["reward_transform_matrix"]
            assert value == pytest.approx((gate * objectives).sum().item(), abs=1e-3)
        rewards.append(got)
    assert rewards[0] != rewards[1]
    with pytest.raises(ValueError, match="add_generation_prompt=True"):
        reward.open(Conversation(PROMPT), Counters(), 32)


def test_a_linear_score_is_the_classifiers():
    model = small_reward("mistral", seed=2, vocabulary=VOCABULARY)
    reward = HeadReward(LoadedBackbone.from_model(model))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[*PROMPT, 5, 6]])).logits[0, 0].item()
    assert reward.score_response(Conversation(PROMPT), [5, 6]) == pytest.approx(expected, abs=1e-10)
    capabilities = reward.capabilities
    assert capabilities.reads_ids and capabilities.tree and not capabilities.gradient


def test_it_guides_a_decoder(tmp_path, random):
    checkpoint(tmp_path, two_layers(random, "v_head.summary"), tokenizer=small_tokenizer())
    reward = HeadReward.from_pretrained(tmp_path)
    policy = small_policy(seed=0, vocabulary=VOCABULARY, dtype=torch.float32)
    plain, guided = (
        generate(policy, small_tokenizer(), ["the end"], ARGS(reward, weight=weight, candidates=4), max_new_tokens=6)[0]
        for weight in (0.0, 5.0)
    )
    assert plain.token_ids != guided.token_ids


def test_what_is_no_reward_is_refused(tmp_path, random):
    checkpoint(tmp_path, two_layers(random, "score", outputs=2))
    with pytest.raises(ValueError, match="2 outputs, but only 1"):
        HeadReward.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 2 outputs, but a reward is one number"):
        HeadReward(LoadedBackbone.from_pretrained(tmp_path, outputs=(2,)))


def test_a_backbone_that_is_not_causal_or_not_finite_is_refused():
    config = BertConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5
    )
    head = FeedForward([torch.nn.Linear(WIDTH, 1)])
    with pytest.raises(ValueError, match=r"BertModel has other hidden states.*not causal"):
        HeadReward(LoadedBackbone(BertModel(config).eval(), head, None))
    model = small_reward(seed=2, vocabulary=VOCABULARY)
    model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        HeadReward(LoadedBackbone.from_model(model))


def test_the_policys_tokenizer_must_agree(tmp_path, random):
    class Other:
        def get_vocab(self):
            return {"a": 0}

    checkpoint(tmp_path, two_layers(random, "score"), tokenizer=small_tokenizer())
    reward = HeadReward.from_pretrained(tmp_path)
    reward.check_tokenizer(small_tokenizer())
    with pytest.raises(ValueError, match="do not share a vocabulary"):
        reward.check_tokenizer(Other())
    with pytest.raises(ValueError, match="context has 512"):
        reward.open(Conversation(PROMPT), Counters(), 600)
