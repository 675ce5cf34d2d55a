"""Heads: every family from a directory with the tensor names of the real one, against its formula in fp64."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import relu
from transformers import BertConfig, BertForSequenceClassification

from ggro_hf.rewards.heads import HEADS, FeedForward, HeadFamily, LoadedBackbone
from tests.ggro_hf.rewards.head_models import (
    OWN_CLASS,
    VOCABULARY,
    WIDTH,
    checkpoint,
    gated,
    hidden_states,
    rewrite_config,
    two_layers,
)
from tests.ggro_hf.small_models import small_policy, small_reward, small_tokenizer

TURN = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
IDS = [0, 17, 45, 200, 90]


@pytest.fixture
def random():
    return torch.Generator().manual_seed(3)


# Names and layouts as the real checkpoints have them, widths apart.
def score(random):
    return {"score.weight": torch.randn(1, WIDTH, generator=random)}


def regression_head(random):
    return {"regression_head.weight": torch.randn(1, WIDTH, generator=random)}


def linear_value(random):
    return {
        "v_head.summary.weight": torch.randn(1, WIDTH, generator=random),
        "v_head.summary.bias": torch.randn(1, generator=random),
    }


def mlp(tensors, module):
    def values(hidden):
        inner = relu(hidden @ tensors[f"{module}.0.weight"].T + tensors[f"{module}.0.bias"])
        return inner @ tensors[f"{module}.2.weight"].T + tensors[f"{module}.2.bias"]

    return values


FAMILIES = {
    "score": (score, lambda tensors: lambda hidden: hidden @ tensors["score.weight"].T),
    "score, two layers": (lambda random: two_layers(random, "score"), lambda tensors: mlp(tensors, "score")),
    "v_head, linear": (
        linear_value,
        lambda tensors: lambda hidden: hidden @ tensors["v_head.summary.weight"].T + tensors["v_head.summary.bias"],
    ),
    "v_head, two layers": (
        lambda random: two_layers(random, "v_head.summary", inner=24),
        lambda tensors: mlp(tensors, "v_head.summary"),
    ),
    "v_head of one tensor": (
        lambda random: {"v_head.weight": torch.randn(1, WIDTH, generator=random)},
        lambda tensors: lambda hidden: hidden @ tensors["v_head.weight"].T,
    ),
    "regression_head": (
        regression_head,
        lambda tensors: lambda hidden: hidden @ tensors["regression_head.weight"].T,
    ),
}


def double(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_gives_the_head_by_hand(tmp_path, random, family, shards):
    make, by_hand = FAMILIES[family]
    tensors = make(random)
    backbone = checkpoint(tmp_path, tensors, shards=shards, tokenizer=small_tokenizer(), config=OWN_CLASS)
    loaded = LoadedBackbone.from_pretrained(tmp_path)
    hidden = hidden_states(backbone, IDS)
    torch.testing.assert_close(hidden_states(loaded.model, IDS), hidden, rtol=0, atol=1e-6)
    rewards = loaded.head.for_prompt(IDS[:2], hidden[:2])(hidden)
    assert rewards.shape == (len(IDS),)
    expected = by_hand(double(tensors))(hidden.double())[:, 0]
    torch.testing.assert_close(rewards.double(), expected, rtol=1e-5, atol=1e-4)
    assert loaded.tokenizer is not None
    assert not any(parameter.requires_grad for parameter in [*loaded.model.parameters(), *loaded.head.parameters()])


def gated_by_hand(tensors, hidden, at_turn, temperature):
    gate = at_turn
    for layer in range(4):
        gate = tensors[f"gating.layers.{layer}.weight"] @ gate + tensors[f"gating.layers.{layer}.bias"]
        gate = relu(gate) if layer < 3 else gate
    gate = torch.softmax(gate / temperature, 0) * tensors["gating.logit_scale"][0]
    objectives = hidden @ tensors["regression_layer.weight"].T
    return (gate * (objectives @ tensors["reward_transform_matrix"])).sum(1)


@pytest.mark.parametrize("temperature", [None, 3.0])
def test_a_gate_reads_the_last_turn_of_the_prompt(tmp_path, random, temperature):
    tensors = gated(random)
    config = OWN_CLASS | ({} if temperature is None else {"gating_temperature": temperature})
    backbone = checkpoint(tmp_path, tensors, tokenizer=small_tokenizer(), config=config)
    loaded = LoadedBackbone.from_pretrained(tmp_path)
    turn = small_tokenizer().encode(TURN, add_special_tokens=False)
    prompt = [0, 40, 41, *turn, 60, 61, *turn]
    ids = [*prompt, 70, 71, 72]
    hidden = hidden_states(backbone, ids)
    readout = loaded.head.for_prompt(prompt, hidden[: len(prompt)])
    at_turn = hidden[len(prompt) - len(turn)].double()
    expected = gated_by_hand(double(tensors), hidden.double(), at_turn, temperature or 10)
    torch.testing.assert_close(readout(hidden).double(), expected, rtol=1e-4, atol=1e-4)
    other = loaded.head.for_prompt(prompt[: 5 + len(turn)], hidden)
    assert (other(hidden) - readout(hidden)).abs().max() > 1e-2


def test_a_gate_without_its_turn_in_the_prompt_says_so(tmp_path, random):
    backbone = checkpoint(tmp_path, gated(random), tokenizer=small_tokenizer())
    loaded = LoadedBackbone.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"open the assistant's.*add_generation_prompt=True"):
        loaded.head.for_prompt(IDS, hidden_states(backbone, IDS))


def test_a_gate_needs_a_tokenizer(tmp_path, random):
    checkpoint(tmp_path, gated(random))
    with pytest.raises(ValueError, match=r"'llama' has a gate.*with its tokenizer"):
        LoadedBackbone.from_pretrained(tmp_path)


ALL = {name: make for name, (make, _) in FAMILIES.items()} | {"gated": gated}


@pytest.mark.parametrize(
    ("family", "gone", "head"),
    [
        ("score, two layers", "score.2.weight", "score"),
        ("score, two layers", "score.0.bias", "score"),
        ("v_head, two layers", "v_head.summary.2.weight", "v_head"),
        ("v_head, two layers", "v_head.summary.0.weight", "v_head"),
        ("v_head, linear", "v_head.summary.bias", "v_head"),
        ("gated", "regression_layer.weight", "gated"),
        ("gated", "gating.layers.3.bias", "gated"),
        ("gated", "gating.logit_scale", "gated"),
        ("gated", "reward_transform_matrix", "gated"),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_head_with_a_tensor_missing_is_refused(tmp_path, random, family, gone, head, named):
    tensors = ALL[family](random)
    del tensors[gone]
    checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*lacks the weights {gone}: they would be random"):
        LoadedBackbone.from_pretrained(tmp_path, head=head if named else "auto")


def test_only_the_first_of_two_layers_is_refused(tmp_path, random):
    tensors = {name: tensor for name, tensor in two_layers(random, "score").items() if ".0." in name}
    checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"score\.2\.bias, score\.2\.weight"):
        LoadedBackbone.from_pretrained(tmp_path)


@pytest.mark.parametrize("head", ["auto", *HEADS])
def test_a_language_model_without_a_head_is_refused(tmp_path, head):
    small_policy(seed=0, vocabulary=VOCABULARY, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the weights of a head.*random.*lm_head\.weight"):
        LoadedBackbone.from_pretrained(tmp_path, head=head)


def test_another_head_than_the_checkpoints_is_refused(tmp_path, random):
    checkpoint(tmp_path, score(random))
    with pytest.raises(ValueError, match=r"weights of a head \(v_head\).*score\.weight"):
        LoadedBackbone.from_pretrained(tmp_path, head="v_head")
    with pytest.raises(ValueError, match=r"head is 'value'.*score, v_head, regression_head, gated"):
        LoadedBackbone.from_pretrained(tmp_path, head="value")


def test_a_backbone_with_a_tensor_missing_is_refused(tmp_path, random):
    checkpoint(tmp_path, score(random))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights layers\.1\.mlp\.up_proj\.weight"):
        LoadedBackbone.from_pretrained(tmp_path)


def test_two_heads_are_decided_by_the_architecture_or_by_name(tmp_path, random):
    tensors = score(random) | two_layers(random, "v_head.summary")
    backbone = checkpoint(tmp_path, tensors, config={"architectures": ["LlamaForSequenceClassification"]})
    hidden = hidden_states(backbone, IDS)
    chosen = LoadedBackbone.from_pretrained(tmp_path).head
    torch.testing.assert_close(chosen(hidden), hidden @ tensors["score.weight"][0], rtol=1e-5, atol=1e-5)
    rewrite_config(tmp_path, architectures=["GRewardModel"])
    with pytest.raises(ValueError, match="several heads: score, v_head; name the one"):
        LoadedBackbone.from_pretrained(tmp_path)
    named = LoadedBackbone.from_pretrained(tmp_path, head="v_head").head
    torch.testing.assert_close(named(hidden), mlp(tensors, "v_head.summary")(hidden)[:, 0], rtol=1e-5, atol=1e-5)


def test_the_config_of_a_value_head_says_how_many_layers_there_must_be(tmp_path, random):
    checkpoint(tmp_path, two_layers(random, "v_head.summary"), config={"vhead_num_layers": 2})
    with pytest.raises(ValueError, match=r"v_head\.summary\.4\.bias, v_head\.summary\.4\.weight"):
        LoadedBackbone.from_pretrained(tmp_path)


def test_outputs_are_checked(tmp_path, random):
    tensors = two_layers(random, "score", outputs=2)
    backbone = checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"'score' of the reward model has 2 outputs, but only 1"):
        LoadedBackbone.from_pretrained(tmp_path)
    hidden = hidden_states(backbone, IDS)
    values = LoadedBackbone.from_pretrained(tmp_path, outputs=(1, 2)).head(hidden)
    torch.testing.assert_close(values, mlp(tensors, "score")(hidden), rtol=1e-5, atol=1e-5)


def test_a_head_of_another_width_is_refused(tmp_path):
    checkpoint(tmp_path, {"score.weight": torch.zeros(1, WIDTH + 2)})
    with pytest.raises(ValueError, match=r"score\.weight of shape \[1, 34\].*32 wide"):
        LoadedBackbone.from_pretrained(tmp_path)


def test_objectives_and_gate_must_match(tmp_path, random):
    checkpoint(tmp_path, gated(random) | {"regression_layer.weight": torch.zeros(20, WIDTH)})
    with pytest.raises(ValueError, match=r"20 objectives.*\[5, 5\].*5 outputs"):
        LoadedBackbone.from_pretrained(tmp_path)


def test_a_head_that_is_not_finite_is_refused(tmp_path):
    checkpoint(tmp_path, {"score.weight": torch.full((1, WIDTH), torch.nan)})
    with pytest.raises(ValueError, match=r"score\.weight that are not finite"):
        LoadedBackbone.from_pretrained(tmp_path)


def test_pickled_weights_and_missing_directories_are_refused(tmp_path):
    with pytest.raises(OSError):
        LoadedBackbone.from_pretrained(tmp_path / "nowhere")
    checkpoint(tmp_path, {})
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no model\.safetensors.*pickled"):
        LoadedBackbone.from_pretrained(tmp_path)


def test_an_encoder_is_refused(tmp_path):
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights of a head.*classifier\.weight"):
        LoadedBackbone.from_pretrained(tmp_path)


def test_a_half_precision_backbone_keeps_its_dtype_and_the_head_computes_in_fp32(tmp_path, random):
    tensors = two_layers(random, "score")
    checkpoint(tmp_path, tensors)
    loaded = LoadedBackbone.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    hidden = torch.randn(4, WIDTH, generator=random).bfloat16()
    expected = mlp(double(tensors), "score")(hidden.double())[:, 0]
    torch.testing.assert_close(loaded.head(hidden).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_model_in_memory(random):
    model = small_reward("gemma3", seed=8, vocabulary=VOCABULARY)
    loaded = LoadedBackbone.from_model(model)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([IDS])).logits[0, 0]
    assert loaded.head(hidden_states(loaded.model, IDS))[-1].item() == pytest.approx(expected.item(), abs=1e-10)
    with pytest.raises(ValueError, match="lacks the weights of a head"):
        LoadedBackbone.from_model(small_policy(seed=0, vocabulary=VOCABULARY))


def test_a_head_can_be_added(tmp_path, random, monkeypatch):
    def build(tensors, config, tokenizer):
        layer = torch.nn.Linear(WIDTH, 1, bias=False)
        layer.weight = torch.nn.Parameter(tensors["reward.projection"][None])
        return FeedForward([layer])

    monkeypatch.setitem(HEADS, "projection", HeadFamily(("reward",), build))
    tensors = {"reward.projection": torch.randn(WIDTH, generator=random)}
    backbone = checkpoint(tmp_path, tensors)
    hidden = hidden_states(backbone, IDS)
    loaded = LoadedBackbone.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.head(hidden), hidden @ tensors["reward.projection"], rtol=1e-5, atol=1e-5)
