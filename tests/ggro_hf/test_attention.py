"""prefix_attention inside transformers' models, against eager attention on every sequence by itself."""

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from ggro_hf.attention import PREFIX_ATTENTION, pack_branches
from ggro_hf.cache import RewindableCache

VOCABULARY, WINDOW = 61, 8
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # Wide enough for attention to matter.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, layer_types=ALTERNATING)
    ),
    # Caps low enough to bite.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SHAPE, sliding_window=WINDOW, layer_types=ALTERNATING, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=WINDOW)),
    # Its layers do not tell the attention function about their window.
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SHAPE,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=1,
        )
    ),
}
BRANCHES = [[5], [7, 9, 11], [5, 6], list(range(20, 32)), [3]]


def model_with(family: str, implementation: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = MODELS[family]().eval()
    model.set_attn_implementation(implementation)
    return model


def tokens(length: int) -> list[int]:
    return torch.randint(4, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def whole_sequences(model: PreTrainedModel, prefix: list[int]) -> Tensor:
    """Logits at the tokens of every branch, each from a forward over prefix and branch without a cache."""
    logits = [
        model(input_ids=torch.tensor([prefix + branch]), use_cache=False).logits[0, len(prefix) :]
        for branch in BRANCHES
    ]
    return torch.cat(logits)


@torch.no_grad()
@pytest.mark.parametrize("cache_type", [RewindableCache, DynamicCache])
@pytest.mark.parametrize("prefix_length", [1, WINDOW - 1, WINDOW, 40, 200])
@pytest.mark.parametrize("family", MODELS)
def test_branches_in_one_forward_equal_whole_sequences(family: str, prefix_length: int, cache_type: type) -> None:
    prefix = tokens(prefix_length)
    expected = whole_sequences(model_with(family, "eager"), prefix)
    model = model_with(family, PREFIX_ATTENTION)
    cache = cache_type(config=model.config)
    model(input_ids=torch.tensor([prefix]), past_key_values=cache)
    logits = model(**pack_branches(BRANCHES, prefix_length), past_key_values=cache).logits[0]
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6 * max(1.0, scale))


@torch.no_grad()
def test_branches_of_two_rows() -> None:
    model = model_with("qwen3", "eager")
    prefixes = [tokens(40), tokens(41)[:40]]
    expected = torch.stack([whole_sequences(model, prefix) for prefix in prefixes])
    model.set_attn_implementation(PREFIX_ATTENTION)
    cache = RewindableCache(model.config)
    model(input_ids=torch.tensor(prefixes), past_key_values=cache)
    packed = {name: x.expand(2, -1) for name, x in pack_branches(BRANCHES, 40).items()}
    torch.testing.assert_close(model(**packed, past_key_values=cache).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_logits_without_a_cache_equal_eager(family: str) -> None:
    input_ids = torch.tensor([tokens(70), tokens(71)[:70]])
    eager, ours = (
        model_with(family, implementation)(input_ids=input_ids, use_cache=False).logits
        for implementation in ("eager", PREFIX_ATTENTION)
    )
    torch.testing.assert_close(ours, eager, rtol=0, atol=2e-6 * max(1.0, eager.abs().max().item()))


@pytest.mark.parametrize("family", MODELS)
def test_greedy_generation_equals_eager(family: str) -> None:
    input_ids = torch.tensor([tokens(20)])
    eager, ours = (
        model_with(family, implementation).generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=40
        )
        for implementation in ("eager", PREFIX_ATTENTION)
    )
    assert eager.shape[1] > 30
    assert torch.equal(ours, eager)


@torch.no_grad()
def test_branches_matter() -> None:
    model = model_with("llama", PREFIX_ATTENTION)
    cache = RewindableCache(model.config)
    model(input_ids=torch.tensor([tokens(30)]), past_key_values=cache)
    packed = pack_branches(BRANCHES, 30)
    branches = model(**packed, past_key_values=cache).logits
    cache.rewind(30)
    packed["branch_starts"] = torch.zeros_like(packed["branch_starts"])
    one_branch = model(**packed, past_key_values=cache).logits
    assert torch.equal(branches[:, 0], one_branch[:, 0])
    assert (branches[:, 1:] - one_branch[:, 1:]).abs().amax(2).min() > 1e-3


def test_pack_branches() -> None:
    packed = pack_branches([[5], [7, 9, 11], [4, 4]], 10)
    assert packed["input_ids"].tolist() == [[5, 7, 9, 11, 4, 4]]
    assert packed["position_ids"].tolist() == [[10, 10, 11, 12, 10, 11]]
    assert packed["branch_starts"].tolist() == [[0, 1, 1, 1, 4, 4]]
    with pytest.raises(ValueError, match="branches must be at least one, got none"):
        pack_branches([], 3)
    with pytest.raises(ValueError, match=r"branches must have at least one token each, got lengths \[1, 0\]"):
        pack_branches([[5], []], 10)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("prefix", [3, WINDOW + 5])
def test_a_branch_is_kept_without_computing_it_again(family: str, prefix: int) -> None:
    model, plain = model_with(family, PREFIX_ATTENTION), model_with(family, "eager")
    cache = RewindableCache(model.config)
    kept = tokens(prefix)
    model(input_ids=torch.tensor([kept]), past_key_values=cache)
    # Longer than what is between the branch and its place, and shorter.
    for chosen in (3, 1, 0, 4, 1):
        model(**pack_branches(BRANCHES, len(kept)), past_key_values=cache)
        start = len(kept) + sum(map(len, BRANCHES[:chosen]))
        cache.keep_branch(len(kept), start, start + len(BRANCHES[chosen]))
        kept = kept + BRANCHES[chosen]
        assert cache.get_seq_length() == len(kept)
    logits = model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits[0, -1]
    expected = plain(input_ids=torch.tensor([[*kept, 9]]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_padding_is_refused(family: str) -> None:
    model = model_with(family, PREFIX_ATTENTION)
    input_ids = torch.tensor([tokens(6), tokens(7)[:6]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="takes no padding, but attention_mask has zeros"):
        model(input_ids=input_ids, attention_mask=mask)
    with pytest.raises(ValueError, match="takes no padding, but attention_mask has zeros"):
        model.generate(input_ids, attention_mask=mask, max_new_tokens=2)


def test_what_it_does_not_compute_is_refused() -> None:
    model = model_with("llama", PREFIX_ATTENTION)
    input_ids = torch.tensor([tokens(6)])
    with pytest.raises(RuntimeError, match=r"has no backward pass: call the model under torch\.no_grad\(\)"):
        model(input_ids=input_ids)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"takes no 4-D attention_mask; give it branch_starts"):
            model(input_ids=input_ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
        with pytest.raises(ValueError, match="needs a cache that ends with the new tokens, not a static one"):
            model(input_ids=input_ids, past_key_values=StaticCache(model.config, max_cache_len=16))
        filled = StaticCache(model.config, max_cache_len=16)
        model_with("llama", "sdpa")(input_ids=input_ids, past_key_values=filled)
        with pytest.raises(ValueError, match="needs a cache that ends with the new tokens, not a static one"):
            model(input_ids=input_ids[:, :1], past_key_values=filled)
        with pytest.raises(ValueError, match="causal and sliding-window attention only"):
            model(input_ids=input_ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
        with pytest.raises(ValueError, match="does not compute attention with s_aux"):
            model(input_ids=input_ids, s_aux=torch.zeros(4))
        attention = model.model.layers[0].self_attn
        attention.is_causal = False
        with pytest.raises(ValueError, match="is causal, but the layer LlamaAttention is not"):
            model(input_ids=input_ids)
        attention.is_causal, attention.attention_dropout = True, 0.1
        with pytest.raises(ValueError, match=r"has no dropout, got 0\.1: call model\.eval\(\)"):
            model.train()(input_ids=input_ids)
