"""A CausalTree against separate forwards of the plain model: every family, every way of packing, any order of work."""

from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile

import numpy as np
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from ggro_hf import RewardModel
from ggro_hf.results import Counters
from ggro_hf.rewards import Conversation, packing, tree
from ggro_hf.rewards.packing import Packing, by_mask, by_prefix_attention, one_by_one, packing_for
from ggro_hf.rewards.tree import CausalTree
from tests.ggro_hf.small_models import FAMILIES, SLIDING_WINDOW, small_policy, small_reward

VOCABULARY = 61
# How branches are packed, the model's own attention, and whether several sequences go through one pass where they can.
WAYS: dict[str, tuple[Packing, str, bool]] = {
    "prefix_attention": (by_prefix_attention, "sdpa", False),
    "prefix_attention, sequences together": (by_prefix_attention, "sdpa", True),
    "mask, sdpa": (by_mask, "sdpa", False),
    "mask, eager": (by_mask, "eager", False),
    "mask, eager, sequences together": (by_mask, "eager", True),
    "one by one": (one_by_one, "sdpa", False),
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


def pack_by(way: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make trees pack that way; the attention implementation that goes with it."""
    pack, attention, together = WAYS[way]
    monkeypatch.setattr(tree, "packing_for", lambda model: pack)
    monkeypatch.setattr(tree, "takes_tails", lambda model: together and packing.takes_tails(model))
    return attention


@cache
def backbone(family: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **shape: int) -> PreTrainedModel:
    model = small_policy(family, seed=3, vocabulary=VOCABULARY, dtype=dtype, **shape).base_model
    model.set_attn_implementation(attention)
    return model


@torch.no_grad()
def plain_hidden(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Hidden states [T, d] of one forward without a cache."""
    return model(input_ids=torch.tensor([token_ids]), use_cache=False).last_hidden_state[0]


def tolerance_of(model: PreTrainedModel) -> float:
    # Eager attention of transformers rounds its weights to fp32 whatever the model's dtype.
    exact = model.dtype is torch.float64 and model.config._attn_implementation != "eager"
    return 1e-9 if exact else 5e-6


def assert_close(actual: torch.Tensor, expected: torch.Tensor, model: PreTrainedModel) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance_of(model) * scale)


@pytest.fixture(autouse=True)
def short_beginnings_get_a_pass(monkeypatch):
    monkeypatch.setattr(tree, "_WORTH_A_PASS", 3)


def common_prefix(sequences):
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))]


@dataclass
class Walk:
    """Does the same to a tree and to plain lists of token ids, and compares."""

    model: PreTrainedModel
    random: np.random.Generator
    capacity: int = 0
    counters: Counters = field(default_factory=Counters)
    counted: int = 0
    sequences: list[list[int]] = field(default_factory=lambda: [[]])
    # Whether the tree has the hidden state at the sequence's end.
    known: list[bool] = field(default_factory=lambda: [False])

    def __post_init__(self) -> None:
        self.tree = CausalTree(self.model, self.counters, self.capacity)

    def tokens(self, fewest: int, most: int) -> list[int]:
        return self.random.integers(0, VOCABULARY, self.random.integers(fewest, most + 1)).tolist()

    def extend(self, tokens: list[int]) -> None:
        hidden = self.tree.extend(tokens)
        self.sequences, self.known = [self.sequences[0] + tokens], [True]
        assert_close(hidden, plain_hidden(self.model, self.sequences[0])[-len(tokens) :], self.model)
        self.counted += len(tokens)

    def go_to_common(self) -> None:
        inputs = []
        for own in self.sequences:
            kept = own[: self.random.integers(max(0, len(own) - 6), len(own) + 1)] + self.tokens(0, 4)
            inputs.append([tuple(kept + self.tokens(1, 3)) for _ in range(self.random.integers(0, 4))])
        before, self.sequences = (
            self.sequences,
            [common_prefix([own, *map(list, of_own)]) for own, of_own in zip(self.sequences, inputs, strict=True)],
        )
        self.known = [known and own == old for known, own, old in zip(self.known, self.sequences, before, strict=True)]
        gained = self.tree.go_to_common(inputs)
        common = common_prefix(list(map(list, inputs[0])))[len(self.sequences[0]) :]
        if len(inputs) > 1 or (len(inputs[0]) - 1) * len(common) <= tree._WORTH_A_PASS:
            assert gained is None
        else:
            self.sequences, self.known = [self.sequences[0] + common], [True]
            assert_close(gained, plain_hidden(self.model, self.sequences[0])[-len(common) :], self.model)
            self.counted += len(common)

    def rewind(self) -> None:
        lengths = [int(self.random.integers(max(0, len(own) - 6), len(own) + 1)) for own in self.sequences]
        self.known = [
            known and length == len(own) for known, own, length in zip(self.known, self.sequences, lengths, strict=True)
        ]
        self.sequences = [own[:length] for own, length in zip(self.sequences, lengths, strict=True)]
        self.tree.rewind(lengths)

    def branch(self) -> None:
        branches = []
        for known in self.known:
            own = [self.tokens(0 if known else 1, 5) for _ in range(self.random.integers(0, 5))]
            if own and self.random.random() < 0.4:
                own.append(list(own[0]))
            if branches and self.random.random() < 0.4:
                own += [branch for branch in branches[-1] if branch]
            branches.append(own)
        if not any(branches):
            branches[0].append(self.tokens(1, 5))
        hidden = self.tree.branch(branches)
        different: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        for sequence, own, states in zip(self.sequences, branches, hidden, strict=True):
            for branch, state in zip(own, states, strict=True):
                expected = plain_hidden(self.model, sequence + branch)
                assert_close(state, expected[-max(1, len(branch)) :], self.model)
            different |= {(tuple(sequence), tuple(branch)) for branch in own}
        self.counted += sum(len(branch) for _, branch in different)
        places = [(sequence, number) for sequence, own in enumerate(branches) for number in range(len(own))]
        # One survivor often enough for several sequences to become one again; repeated ones to fork.
        survivors = 1 if self.random.random() < 0.3 else self.random.integers(1, 5)
        chosen = [places[index] for index in self.random.integers(0, len(places), survivors)]
        self.tree.keep(chosen)
        self.known = [self.known[sequence] or bool(branches[sequence][number]) for sequence, number in chosen]
        self.sequences = [self.sequences[sequence] + branches[sequence][number] for sequence, number in chosen]

    def step(self) -> None:
        at = self.random.random()
        if len(self.sequences) == 1 and at < 0.15:
            self.extend(self.tokens(1, 4))
        elif at < 0.25:
            self.go_to_common()
        elif at < 0.35 and all(self.sequences):
            self.rewind()
        else:
            self.branch()
        assert self.tree.sequences == self.sequences
        assert self.counters.reward_forward_tokens == self.counted
        if len(self.sequences) == 1 and self.known[0]:
            assert_close(self.tree.branch([[[]]])[0][0][0], plain_hidden(self.model, self.sequences[0])[-1], self.model)


@EVERY_WAY
@EVERY_FAMILY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_any_order_of_work_equals_separate_forwards(family, way, dtype, monkeypatch):
    attention = pack_by(way, monkeypatch)
    longest = most = 0
    for seed in range(2):
        walk = Walk(backbone(family, dtype, attention), np.random.default_rng(seed), capacity=40 * seed)
        for _ in range(14):
            walk.step()
            longest = max(longest, *map(len, walk.sequences))
            most = max(most, len(walk.sequences))
    assert longest > 2 * SLIDING_WINDOW
    assert most > 2


@EVERY_WAY
@pytest.mark.parametrize("key_heads", [1, 4], ids=["MQA", "MHA"])
def test_other_numbers_of_key_heads(key_heads, way, monkeypatch):
    attention = pack_by(way, monkeypatch)
    walk = Walk(backbone("llama", torch.float64, attention, num_key_value_heads=key_heads), np.random.default_rng(5))
    for _ in range(12):
        walk.step()


@EVERY_WAY
def test_the_buffers_grow(way, monkeypatch):
    attention = pack_by(way, monkeypatch)
    walk = Walk(backbone("gemma3", torch.float64, attention), np.random.default_rng(1))
    walk.extend(walk.tokens(250, 250))
    # Buffers start at 256 tokens: first branches outgrow them, then what is kept.
    for _ in range(6):
        walk.branch()
    assert max(map(len, walk.sequences)) > 256
    walk.tree.rewind([len(own) - 1 for own in walk.sequences])


@EVERY_FAMILY
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_family_goes_through_one_pass(family, attention):
    model = backbone(family, torch.float32, attention)
    assert packing_for(model) is by_prefix_attention
    # A window counts the tails of other sequences.
    assert packing.takes_tails(model) == (family == "llama")


def test_a_pass_is_one_forward():
    model = backbone("qwen3", torch.float32)
    walk = Walk(model, np.random.default_rng(2))
    walk.extend([1, 2, 3])
    passes = []
    handle = model.register_forward_hook(lambda module, args, kwargs, output: passes.append(1), with_kwargs=True)
    walk.tree.branch([[[1], [2, 3], [4, 5, 6], [2, 3], []]])
    handle.remove()
    assert passes == [1]
    assert walk.counters.reward_forward_tokens == 3 + 6


def test_attention_that_refuses_ours_falls_back_to_a_mask():
    """gpt-oss has attention sinks, which prefix_attention does not compute."""
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GptOssForCausalLM(config).eval().requires_grad_(False).base_model
    assert packing_for(model) is by_mask
    walk = Walk(model, np.random.default_rng(4))
    for _ in range(12):
        walk.step()


def test_attention_that_takes_nothing_of_ours_falls_back_to_single_passes(monkeypatch):
    model = small_policy(seed=3, vocabulary=VOCABULARY).base_model
    plain = type(model).forward

    def deaf(self, *args, attention_mask=None, position_ids=None, branch_starts=None, **kwargs):
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", deaf)
    assert packing_for(model) is one_by_one
    walk = Walk(model, np.random.default_rng(4))
    for _ in range(12):
        walk.step()


def test_a_way_that_is_wrong_is_noticed(monkeypatch):
    """A kernel that lets branches see each other passes for none."""

    def leaking(model, cache, branches, prefix_length):
        joined = [token for branch in branches for token in branch]
        return packing.run(model, cache, joined)

    model = small_policy(seed=4, vocabulary=VOCABULARY).base_model
    monkeypatch.setattr(packing, "by_prefix_attention", leaking)
    assert packing_for(model) is by_mask


@EVERY_FAMILY
def test_a_scoring_equals_the_classifiers_forward(family):
    model = small_reward(family, seed=2, vocabulary=VOCABULARY)
    prompt = list(range(4, 4 + SLIDING_WINDOW + 3))
    scoring = RewardModel(model).open(Conversation(prompt), Counters(), 40)
    random = np.random.default_rng(0)
    sequences = [prompt]
    for _ in range(4):
        branches = [[random.integers(4, VOCABULARY, n).tolist() for n in (3, 0, 1, 5)] for _ in sequences]
        rewards = scoring.score(branches)
        for sequence, own, values in zip(sequences, branches, rewards, strict=True):
            plain = [model(torch.tensor([sequence + branch])).logits[0, 0].item() for branch in own]
            assert values == pytest.approx(plain, abs=1e-9)
        chosen = [(int(random.integers(len(sequences))), int(random.integers(4))) for _ in range(3)]
        scoring.keep(chosen)
        sequences = [sequences[sequence] + branches[sequence][number] for sequence, number in chosen]


def test_equal_branches_of_equal_sequences_are_computed_once():
    """And have rewards that are equal to the bit, so that ties are ties."""
    counters = Counters()
    model = RewardModel(small_reward(seed=2, vocabulary=VOCABULARY, dtype=torch.float32))
    scoring = model.open(Conversation([5, 6, 7]), counters, 40)
    scoring.score([[[8], [9], [8]]])
    scoring.keep([(0, 0), (0, 1), (0, 2), (0, 0)])
    counted = counters.reward_forward_tokens
    assert counted == 3 + 2
    rewards = scoring.score([[[1, 2], [], [3]], [[1, 2]], [[4], [3], [1, 2]], [[], [1, 2], [1, 2], []]])
    assert counters.reward_forward_tokens == counted + (2 + 1 + 1) + 2
    assert rewards[0][0] == rewards[2][2] == rewards[3][1] == rewards[3][2] != rewards[1][0]
    assert rewards[0][1] == rewards[3][0] == rewards[3][3]
    assert rewards[0][2] == rewards[2][1]


def test_misuse_is_named():
    walk = Walk(backbone("llama"), np.random.default_rng(0))
    walk.extend([5, 6])
    with pytest.raises(ValueError, match="branches has lists for 2 sequences, but there are 1"):
        walk.tree.branch([[[1]], [[2]]])
    walk.tree.branch([[[1], [2]]])
    with pytest.raises(ValueError, match="chosen must name one branch or more"):
        walk.tree.keep([])


def test_a_shortened_sequence_has_no_hidden_state_at_its_end():
    walk = Walk(backbone("llama"), np.random.default_rng(0))
    walk.extend([5, 6, 7, 8])
    walk.tree.branch([[[1], [2]]])
    walk.tree.keep([(0, 0), (0, 1)])
    walk.tree.rewind([5, 3])
    (whole,), (shortened,) = walk.tree.branch([[[]], [[]]])
    assert_close(whole[0], plain_hidden(walk.model, [5, 6, 7, 8, 1])[-1], walk.model)
    assert shortened.isnan().all()
