"""The rewindable cache against plain forwards, past sliding windows and through rewinding."""

import random

import pytest
import torch
from transformers import Qwen3NextConfig, T5Config, T5ForConditionalGeneration

from ggro_hf.policy import Policy
from ggro_hf.results import Counters
from tests.ggro_hf.device_cases import Logits
from tests.ggro_hf.small_models import FAMILIES, SLIDING_WINDOW, small_policy

VOCABULARY = 61


def plain_logits(model, token_ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_order_of_extending_rewinding_and_restoring_equals_plain_forwards(family):
    model = small_policy(family, seed=3, vocabulary=VOCABULARY)
    policy = Policy(model, Counters(), Logits())
    choices = random.Random(0)
    with torch.no_grad():
        policy.extend([choices.randrange(VOCABULARY) for _ in range(SLIDING_WINDOW + 3)])
        for _ in range(30):
            length = len(policy.token_ids)
            start = choices.randrange(max(1, length - SLIDING_WINDOW - 2), length + 1)
            branch = policy.save(start)
            policy.rewind(start)
            policy.extend([choices.randrange(VOCABULARY) for _ in range(choices.randrange(1, 6))])
            if choices.random() < 0.5:
                policy.rewind(start)
                policy.restore(branch)
            policy.extend([choices.randrange(VOCABULARY) for _ in range(choices.randrange(1, 3))])
            torch.testing.assert_close(policy.position, plain_logits(model, policy.token_ids), rtol=0, atol=1e-9)


def test_counts_only_the_tokens_that_were_computed():
    counters = Counters()
    policy = Policy(small_policy(seed=0, vocabulary=VOCABULARY), counters, Logits(), capacity=4)
    with torch.no_grad():
        policy.extend([5, 6, 7, 8, 9])
        policy.move_to([5, 6, 7, 20, 21, 22])
        assert counters.policy_tokens == 5 + 3
        policy.move_to([5, 6])
    assert policy.token_ids == [5, 6]
    assert counters.policy_tokens == 5 + 3 + 1


def test_the_buffer_grows_past_its_capacity():
    model = small_policy(seed=1, vocabulary=VOCABULARY)
    policy = Policy(model, Counters(), Logits(), capacity=1)
    with torch.no_grad():
        for start in range(0, 300, 60):
            policy.extend([(start + i) % VOCABULARY for i in range(60)])
    torch.testing.assert_close(policy.position, plain_logits(model, policy.token_ids), rtol=0, atol=1e-9)


def test_a_state_that_cannot_be_rewound_is_refused():
    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    model = small_policy(seed=0, vocabulary=VOCABULARY)
    model.config = config
    with pytest.raises(ValueError, match=r"qwen3_next.*cannot be rewound"):
        Policy(model, Counters(), Logits())


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, which is no decoder-only"):
        Policy(T5ForConditionalGeneration(config), Counters(), Logits())
