"""Rewards and gradients of segments behind prefixes against autograd through the plain model's whole forward."""

import logging
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    BloomConfig,
    BloomForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GptOssConfig,
    GptOssForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForSequenceClassification,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ggro_hf.results import Counters
from ggro_hf.rewards import RewardModel, RewardPrefix, behind, score_segments
from ggro_hf.rewards import segment_pass as segment_passes
from ggro_kernels.library import automatic
from tests.ggro_hf.small_models import FAMILIES, PAD, SLIDING_WINDOW, _as_dtype, small_reward

VOCABULARY = 61
_SHAPE = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 1, "num_labels": 1}
_ROTARY = _SHAPE | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
_GPT2 = _SHAPE | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
OTHERS = {
    # Caps low enough to bite.
    "gemma2": lambda: Gemma2ForSequenceClassification(
        Gemma2Config(
            **_ROTARY,
            sliding_window=SLIDING_WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=8,
        )
    ),
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(**_GPT2)),
    "gpt2, scaled by layer": lambda: GPT2ForSequenceClassification(
        GPT2Config(**_GPT2, scale_attn_by_inverse_layer_idx=True)
    ),
    "opt": lambda: OPTForSequenceClassification(
        OPTConfig(
            **_SHAPE,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            init_std=0.2,
        )
    ),
    "qwen2_moe": lambda: Qwen2MoeForSequenceClassification(
        Qwen2MoeConfig(
            **_ROTARY,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            use_sliding_window=True,
            sliding_window=SLIDING_WINDOW,
            max_window_layers=1,
        )
    ),
    "bloom": lambda: BloomForSequenceClassification(
        BloomConfig(**_SHAPE, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    ),
    "gpt_oss": lambda: GptOssForSequenceClassification(
        GptOssConfig(
            **{**_ROTARY, "intermediate_size": 32},
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=SLIDING_WINDOW,
        )
    ),
}
# Attention with biases or sinks is the model's own.
ONE_BY_ONE = ("bloom", "gpt_oss")
TOGETHER = [*FAMILIES, *(name for name in OTHERS if name not in ONE_BY_ONE)]


EXACT = "exact_attention"


def _exact_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """As transformers' eager attention, but for its softmax in fp32."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return ((scores + attention_mask).softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(EXACT, _exact_attention)
AttentionMaskInterface.register(EXACT, eager_mask)


@cache
def reward(name: str = "llama", dtype: torch.dtype = torch.float64, **shape: int) -> RewardModel:
    """Asked for itself, its model attends in fp64 throughout, where that is its dtype."""
    if name in FAMILIES:
        model = small_reward(name, seed=2, vocabulary=VOCABULARY, dtype=dtype, **shape)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = _as_dtype(OTHERS[name](), dtype)
    model.set_attn_implementation("eager" if name in ONE_BY_ONE else EXACT)
    return RewardModel(model)


def plain(model: PreTrainedModel, prefix: list[int], segment: list[int]) -> tuple[float, torch.Tensor]:
    """Reward of the whole, and its gradient at the segment's embeddings, by one forward without a cache."""
    ids = torch.tensor([prefix + segment])
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    value = model.score(hidden[0, -1])[0]
    (gradient,) = torch.autograd.grad(value, embeddings)
    return value.item(), gradient[0, len(prefix) :]


def tokens(random: np.random.Generator, count: int) -> list[int]:
    return random.integers(4, VOCABULARY, count).tolist()


def opened(scored: RewardModel, ids: list[int]) -> RewardPrefix:
    prefix = RewardPrefix(scored, Counters())
    prefix.extend(list(ids))
    return prefix


def assert_scores(scored, model, prefix_ids, segment, wanted, tolerance):
    value, gradient = plain(model, prefix_ids, segment)
    scale = max(1.0, float(gradient.abs().max()), abs(value))
    assert scored.reward == pytest.approx(value, abs=tolerance * scale, rel=0)
    if wanted == 0:
        assert scored.gradient is None
        return
    assert scored.gradient.shape == gradient[:wanted].shape
    torch.testing.assert_close(scored.gradient, gradient[:wanted], rtol=0, atol=tolerance * scale)


TOLERANCES = {torch.float64: 1e-9, torch.float32: 3e-5}


# Neither transformers' experts nor the attention of the last ones computes in fp64.
CASES = [(name, dtype) for name in TOGETHER for dtype in TOLERANCES if (name, dtype) != ("qwen2_moe", torch.float64)]
CASES += [(name, torch.float32) for name in ONE_BY_ONE]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_rewards_and_gradients_are_those_of_a_plain_forward(name, dtype):
    """Segments of one token and more than a window, behind prefixes of one token and more than a window."""
    scored = reward(name, dtype)
    assert (scored.passes is None) == (name in ONE_BY_ONE)
    random = np.random.default_rng(0)
    prefix_ids = [tokens(random, length) for length in (1, SLIDING_WINDOW, 3 * SLIDING_WINDOW + 1, 5)]
    prefixes = [opened(scored, ids) for ids in prefix_ids]
    # What is recorded for one set of lengths is run for others.
    for lengths in (
        [[1], [3, 2 * SLIDING_WINDOW], [1, 1, 4], [SLIDING_WINDOW]],
        [[9, 2], [SLIDING_WINDOW + 1], [5], [20]],
        [[1, 1], [30], [2], [2, 2]],
        [[1], [1], [1], [1]],
    ):
        segments = [[tokens(random, length) for length in own] for own in lengths]
        for wanted in ([1, 1, 1, 1], [3, 0, 2, 50], [0, 0, 0, 0]):
            found = score_segments(list(zip(prefixes, segments, strict=True)), wanted)
            for ids, own, scores, count in zip(prefix_ids, segments, found, wanted, strict=True):
                for segment, one in zip(own, scores, strict=True):
                    assert_scores(one, scored.model, ids, segment, count, TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "gpt_oss"])
def test_segments_become_prefix(name):
    """Where they are, from a copy, or after another pass."""
    dtype = torch.float32 if name in ONE_BY_ONE else torch.float64
    scored, tolerance = reward(name, dtype), TOLERANCES[dtype]
    random = np.random.default_rng(1)
    prefix_ids = [tokens(random, length) for length in (4, 19)]
    prefixes = [opened(scored, ids) for ids in prefix_ids]
    for round_ in range(6):
        segments = [[tokens(random, length) for length in random.integers(1, 12, 3)] for _ in prefixes]
        found = score_segments(list(zip(prefixes, segments, strict=True)), 1)
        copies = [prefix.read(scores[2].place) for prefix, scores in zip(prefixes, found, strict=True)]
        if round_ % 2:
            score_segments([(prefix, [tokens(random, 15)]) for prefix in prefixes], 1)
        for number, prefix in enumerate(prefixes):
            chosen = 2 if round_ % 2 else round_ % 3
            segment, score = segments[number][chosen], found[number][chosen]
            prefix.commit(list(segment), score.reward, copies[number] if round_ % 2 else score.place)
            prefix_ids[number] += segment
            assert prefix.token_ids == prefix_ids[number]
            value, _ = plain(scored.model, prefix_ids[number][:1], prefix_ids[number][1:])
            assert prefix.reward == pytest.approx(value, abs=tolerance * max(1.0, abs(value)), rel=0)
    for prefix, ids in zip(prefixes, prefix_ids, strict=True):
        assert_scores(prefix.score([5, 6, 7], 2), scored.model, ids, [5, 6, 7], 2, tolerance)


def test_multi_query_and_multi_head():
    for key_heads in (1, 4):
        scored = reward("qwen3", num_key_value_heads=key_heads)
        (one,) = score_segments([(opened(scored, [5, 6, 7]), [[8, 9, 10]])], 3)[0]
        assert_scores(one, scored.model, [5, 6, 7], [8, 9, 10], 3, 1e-9)


def test_a_pass_is_bitwise_the_same_beside_whatever_other_segments():
    """Those of one recording: products by rows that see no others. Not promised where nothing is recorded."""
    scored = reward("llama", torch.float32)
    random = np.random.default_rng(2)
    ids, segment = tokens(random, 9), tokens(random, 4)
    for others in ([3, 1], [2, 2], [4], [1, 1, 1, 1]):
        works = [(opened(scored, tokens(random, 6)), [tokens(random, length)]) for length in others]
        found = [score_segments([(opened(scored, ids), [segment]), *works], 2)[0][0] for _ in range(2)]
        assert found[0].reward == found[1].reward
        assert torch.equal(found[0].gradient, found[1].gradient)
        assert_scores(found[0], scored.model, ids, segment, 2, 3e-5)


@pytest.mark.skipif(automatic("prefix_attention", torch.device("cpu"), torch.float32) != "native", reason="no kernels")
def test_a_recording_calls_the_kernels_itself():
    scored = reward("llama", torch.float32)
    prefix = opened(scored, [5, 6, 7])
    with mock.patch.multiple(behind, prefix_attention_op=None, prefix_attention_backward_op=None):
        for segment in ([8, 9, 10], [11, 12]):
            assert_scores(prefix.score(segment, 2), scored.model, [5, 6, 7], segment, 2, 3e-5)


def test_nan_stays_with_its_segment():
    model = small_reward(seed=2, vocabulary=VOCABULARY, dtype=torch.float64)
    model.set_attn_implementation(EXACT)
    scored = RewardModel(model)
    model.get_input_embeddings().weight[60] = torch.nan
    healthy, broken = opened(scored, [5, 6, 7]), opened(scored, [8, 60])
    for _ in range(3):
        works = [(broken, [[9, 10]]), (healthy, [[11, 12, 13], [14, 60], [15]])]
        (lost,), (first, second, third) = score_segments(works, 1)
        assert np.isnan(lost.reward) and np.isnan(second.reward)
        assert torch.isnan(lost.gradient).all()
        assert_scores(first, model, [5, 6, 7], [11, 12, 13], 1, 1e-9)
        assert_scores(third, model, [5, 6, 7], [15], 1, 1e-9)
    # What was behind the prefix before is not seen either.
    (after,) = score_segments([(healthy, [[9]])], 1)[0]
    assert_scores(after, model, [5, 6, 7], [9], 1, 1e-9)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_counters_count_each_prefix_by_itself(name):
    scored = reward(name)
    first, second, third = (opened(scored, [5, 6, 7]) for _ in range(3))
    counters = [prefix._counters for prefix in (first, second, third)]
    for own in counters:
        own.reward_forward_tokens = 0
    found = score_segments([(first, [[8, 9], [10]]), (second, [[11], []]), (third, [[]])], [2, 0, 1])
    assert [own.reward_forward_tokens for own in counters] == [3, 1, 0]
    assert [own.reward_backward_tokens for own in counters] == [3, 0, 0]
    assert [[score.gradient is None for score in own] for own in found] == [[False, False], [True, True], [True]]
    # Empty segments are the prefix.
    assert found[1][1].reward == second.reward and found[1][1].place is None
    assert score_segments([(third, [[]])]) == [[found[2][0]]]
    assert score_segments([]) == []


def test_weights_that_change_are_seen():
    model = small_reward(seed=2, vocabulary=VOCABULARY, dtype=torch.float64)
    model.set_attn_implementation(EXACT)
    scored = RewardModel(model)
    for scale in (1.0, 0.5):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(scale)
        for _ in range(2):
            assert_scores(opened(scored, [5, 6]).score([7, 8], 1), model, [5, 6], [7, 8], 1, 1e-9)
    replaced = torch.nn.Linear(32, 1, bias=False, dtype=torch.float64).requires_grad_(False)
    model.score = replaced
    assert_scores(opened(scored, [5, 6]).score([7, 8], 1), model, [5, 6], [7, 8], 1, 1e-9)


def test_few_recordings_are_kept_and_long_passes_are_not_recorded():
    scored = reward("qwen3")
    prefix = opened(scored, [5, 6])
    random = np.random.default_rng(3)
    for length in [*range(1, 60), segment_passes._LONGEST + 1]:
        segment = tokens(random, length)
        score = prefix.score(segment, 1)
        if length % 13 == 0 or length > 60:
            assert_scores(score, scored.model, [5, 6], segment, 1, 1e-9)
    kept = scored.passes._recorded
    assert 0 < len(kept) <= segment_passes._MOST_RECORDINGS
    assert max(length for length, _ in kept) <= segment_passes._LONGEST


def test_a_token_that_the_model_does_not_know_does_not_end_recording():
    scored = RewardModel(small_reward(seed=2, vocabulary=VOCABULARY, dtype=torch.float64))
    prefix = opened(scored, [5, 6])
    with pytest.raises(IndexError):
        prefix.score([7, VOCABULARY, 8], 1)
    assert not scored.passes._recorded
    assert_scores(prefix.score([7, 9, 8], 1), scored.model, [5, 6], [7, 9, 8], 1, 1e-9)
    assert scored.passes._recorded


def test_a_model_that_cannot_be_recorded_goes_by_ordinary_passes(caplog):
    model = small_reward(seed=2, vocabulary=VOCABULARY, dtype=torch.float64)
    model.set_attn_implementation(EXACT)
    with mock.patch.object(segment_passes, "Recording", side_effect=RuntimeError("not today")):
        scored = RewardModel(model)
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                score = opened(scored, [5, 6]).score([7, 8], 1)
                assert_scores(score, model, [5, 6], [7, 8], 1, 1e-9)
    assert caplog.text.count("scores segments by ordinary passes: not today") == 1
    assert model.config._attn_implementation == EXACT


def test_bf16():
    for name in FAMILIES:
        scored = reward(name, torch.bfloat16)
        value = plain(scored.model, [5, 6, 7], [8, 9])[0]
        score = opened(scored, [5, 6, 7]).score([8, 9], 1)
        assert score.reward == pytest.approx(value, abs=0.1 * max(1.0, abs(value)))
        assert score.gradient.dtype is torch.bfloat16 and score.gradient.isfinite().all()
