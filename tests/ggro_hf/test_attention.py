"""prefix_attention inside transformers' models, against eager attention on every sequence by itself."""

import pytest
import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
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
from transformers.cache_utils import DynamicLayer

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
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, sliding_window=WINDOW, layer_types=ALTERNATING, query_pre_attn_scalar=8)
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


class BranchBuffers(DynamicLayer):
    """The branches of every row in one buffer, which new tokens are written to at `ends`; the prefixes beside it.

    `known[b][i]` are keys and values of prompt `b` and of its candidate `i`. What they leave free is NaN.
    """

    def __init__(self, known: list[list[tuple[Tensor, Tensor]]], lengths: Tensor, starts: Tensor, ends: Tensor) -> None:
        super().__init__()
        like = known[0][0][0]
        rows, heads, _, width = len(known), *like.shape[1:]
        self.prefix_keys, self.prefix_values, self.keys, self.values = (
            like.new_full((rows, heads, room, width), torch.nan)
            for room in (*[int(lengths.max())] * 2, *[int(ends.max()) + 5] * 2)
        )
        for row, length in enumerate(lengths.tolist()):
            for start, pair in zip(starts[row].tolist(), known[row], strict=True):
                for x, prefix, own in zip(
                    pair, (self.prefix_keys, self.prefix_values), (self.keys, self.values), strict=True
                ):
                    prefix[row, :, :length] = x[0, :, :length]
                    own[row, :, start : start + x.shape[2] - length] = x[0, :, length:]
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
        self.ends = ends

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        places = self.ends[:, None, :, None].expand_as(key_states)
        return self.keys.scatter_(2, places, key_states), self.values.scatter_(2, places, value_states)

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


@torch.no_grad()
@pytest.mark.parametrize("lengths", [((1, 4, 12), (3, 2, 9)), ((1,), (20,))], ids=["three each", "one each"])
@pytest.mark.parametrize("family", MODELS)
def test_branches_of_several_prompts_in_one_forward(family: str, lengths: tuple[tuple[int, ...], ...]) -> None:
    plain, model = model_with(family, "eager"), model_with(family, PREFIX_ATTENTION)
    prompts = [tokens(5), tokens(30)]
    sequences = [
        [prompt + tokens(100 + length)[:length] for length in row] for prompt, row in zip(prompts, lengths, strict=True)
    ]
    known, expected = [], []
    for row in sequences:
        caches = [RewindableCache(plain.config) for _ in row]
        for sequence, cache in zip(row, caches, strict=True):
            plain(input_ids=torch.tensor([sequence[:-1]]), past_key_values=cache)
        known.append([cache.read(0, len(sequence) - 1) for sequence, cache in zip(row, caches, strict=True)])
        whole = [plain(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1] for sequence in row]
        expected.append(torch.stack(whole))

    # In another order in the second row's buffer.
    starts = 24 * torch.arange(len(lengths[0]))
    starts = torch.stack([starts, starts.flip(0)])
    ends = starts + torch.tensor(lengths) - 1
    prefix_lengths = torch.tensor([len(prompt) for prompt in prompts])
    layers = [
        BranchBuffers([[one[layer] for one in row] for row in known], prefix_lengths, starts, ends)
        for layer in range(model.config.num_hidden_layers)
    ]
    logits = model(
        input_ids=torch.tensor([[sequence[-1] for sequence in row] for row in sequences]),
        position_ids=prefix_lengths[:, None] + ends - starts,
        past_key_values=Cache(layers=layers),
        branch_starts=starts,
        branch_ends=ends,
        prefix_lengths=prefix_lengths,
        lanes=layers,
    ).logits
    scale = max(1.0, max(x.abs().max().item() for x in expected))
    torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=2e-6 * scale)


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
