"""Models whose layers accelerate has placed, some of them on the disk until a pass needs them."""

import pytest
import torch

from ggro_hf import RewardModel
from ggro_hf.decoding.base import MAX_BATCH_TOKENS, Request
from tests.ggro_hf.device_cases import CPU, DECODERS, PROMPT, VOCABULARY, assert_same, policy_on, request, reward_on
from tests.ggro_hf.small_models import small_reward, small_tokenizer

accelerate = pytest.importorskip("accelerate")

METHODS = ["greedy", "best-of-n", "args", "cards", "cbs", "ggro", "ggro, runs of tokens", "ggro, as released"]


def placed(model: torch.nn.Module, folder) -> torch.nn.Module:
    """The model as `device_map` leaves it: the second layer's weights are on the disk."""
    names = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    layer = "model.layers.1"
    device_map = {name: "cpu" for name in names if not name.startswith(layer)} | {layer: "disk"}
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    policy = placed(policy_on(CPU), tmp_path_factory.mktemp("policy"))
    reward = placed(small_reward(seed=1, vocabulary=VOCABULARY, dtype=torch.float32), tmp_path_factory.mktemp("reward"))
    assert any(parameter.device.type == "meta" for parameter in policy.parameters())
    return policy, RewardModel(reward, small_tokenizer())


@pytest.mark.parametrize("name", METHODS)
def test_placed_models_answer_as_plain_ones(models, name):
    policy, reward = models
    expected = DECODERS[name](reward_on(CPU)).respond(request(policy_on(CPU), name))
    assert_same(DECODERS[name](reward).respond(request(policy, name)), expected, 1e-5)


def test_batches_of_placed_models(models):
    policy, reward = models
    prompts = [PROMPT, PROMPT[:2], PROMPT + PROMPT]

    def responses(policy, reward):
        requests = [Request(policy, prompt, 9, frozenset(), row) for row, prompt in enumerate(prompts)]
        return list(DECODERS["ggro"](reward).respond_all(requests, MAX_BATCH_TOKENS))

    for actual, expected in zip(responses(policy, reward), responses(policy_on(CPU), reward_on(CPU)), strict=True):
        assert_same(actual, expected, 1e-5)
