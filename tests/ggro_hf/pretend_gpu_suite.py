"""Models on a pretended GPU: the results are those of the CPU, and a token costs one read.

Run by test_pretend_gpu.py, in a process of its own.
"""

import pytest
import torch

from benchmarks import gpu_decoding
from ggro_hf import (
    GGRO,
    PREFIX_ATTENTION,
    EncoderReward,
    Greedy,
    HeadReward,
    ImplicitReward,
    LoadedBackbone,
    ProcessReward,
    TextReward,
    decode_step,
    pack_branches,
)
from ggro_hf.cache import RewindableCache
from ggro_hf.decoding import segment_decoding
from ggro_hf.decoding.batch import BatchDecoder
from ggro_hf.policy import Policy
from ggro_hf.policy_lanes import takes_lanes
from ggro_hf.policy_rows import _shares_prefix
from ggro_hf.reading import TopK
from ggro_hf.results import Counters
from ggro_hf.rewards import EndedSteps
from ggro_hf.transfer import to_host
from ggro_kernels import candidate_scores
from tests.ggro_hf.device_cases import (
    CPU,
    DECODERS,
    NEW_TOKENS,
    PROMPT,
    assert_same,
    policy_on,
    request,
    reward_on,
)
from tests.ggro_hf.pretend_gpu import DEVICE, NAME, OnPretendGPU, pretend_gpu
from tests.ggro_hf.replayed import Replayed, replaying
from tests.ggro_hf.rewards.text_models import conversation, encoder_tokenizer, gemma_like_tokenizer, small_encoder
from tests.ggro_hf.small_models import PAD, small_policy, small_reward, small_tokenizer


@pytest.fixture(scope="module")
def expected():
    """What every decoder answers on the CPU."""
    policy, reward = policy_on(CPU), reward_on(CPU)
    return {name: make(reward).respond(request(policy, name)) for name, make in DECODERS.items()}


class Forwards:
    """Counts the forward passes of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.count = 0
        module.register_forward_pre_hook(self._add)

    def _add(self, module: torch.nn.Module, args: object) -> None:
        self.count += 1


PLACES = {"both": (DEVICE, DEVICE), "policy": (DEVICE, CPU), "reward": (CPU, DEVICE)}
APART = [
    (name, place) for name in ("best-of-n", "args", "cards", "ggro, runs of tokens") for place in ("policy", "reward")
]


DRAWN_TOGETHER = ("best-of-n", "rejection-sampling", "cards", "cbs", "tbs")


@pytest.mark.parametrize(("name", "place"), [*((name, "both") for name in DECODERS), *APART])
def test_the_cpus_results_with_one_transfer_each_way_for_every_pass(expected, monkeypatch, name, place):
    policy_device, reward_device = PLACES[place]
    with pretend_gpu() as transfers:
        policy, reward = policy_on(policy_device), reward_on(reward_device)
        decoder = DECODERS[name](reward)
        # Once a model, rows of it are tried on a few tokens.
        Policy(policy, Counters(), TopK(1)).extend(list(PROMPT))
        _shares_prefix(policy)
        takes_lanes(policy)
        policy_passes, reward_passes = Forwards(policy), Forwards(reward.model.base_model)
        proposals = []

        def counted(*args):
            proposals.append(args)
            return candidate_scores(*args)

        monkeypatch.setattr(segment_decoding, "candidate_scores", counted)
        transfers.clear()
        actual = decoder.respond(request(policy, name))
    assert_same(actual, expected[name], 1e-5)
    on_policy, on_reward = policy_device == DEVICE, reward_device == DEVICE
    passes = on_policy * policy_passes.count + on_reward * (reward_passes.count + len(proposals))
    if name in DRAWN_TOGETHER:
        # Numbers to draw by, and which rows go on.
        assert passes <= transfers.uploads <= 4 * passes
    else:
        assert transfers.uploads == passes
    # Logits are read once after every pass; rewards too, but the prompt's and those of several beams with others.
    # A segment is drawn from logits that may have been read before, to see that the one before it ends there.
    assert transfers.reads <= passes + len(actual.trace.segments)
    # The shape of lanes is found out by a pass that nobody reads.
    in_lanes = isinstance(decoder, BatchDecoder) and decoder._rows(alone=True) > 1
    unread = (on_reward and name.startswith("args")) or (on_policy and in_lanes)
    assert name in DRAWN_TOGETHER or transfers.reads == passes - unread
    assert policy_passes.count > 5


@pytest.mark.parametrize("name", ["greedy", "sample", "ggro"])
def test_captured_steps_cross_to_the_host_once_a_token(expected, monkeypatch, name):
    captured, ordinary = [], []

    def capture(function, device):
        def without_transfers():
            before = (transfers.reads, transfers.uploads)
            results = function()
            assert (transfers.reads, transfers.uploads) == before
            return results

        captured.append(Replayed(without_transfers, device))
        return captured[-1]

    def forward(*args):
        ordinary.append(args)
        return decode_step.forward(*args)

    monkeypatch.setattr("ggro_hf.policy.forward", forward)
    with pretend_gpu() as transfers, replaying(NAME, capture):
        policy, reward = policy_on(DEVICE), reward_on(CPU)
        decoder = DECODERS[name](reward)
        if isinstance(decoder, GGRO):
            # One candidate at a time, by the step that all decoders share.
            decoder.speculate = 1
        decoder.respond(request(policy, name))
        transfers.clear()
        ordinary.clear()
        replays = captured[0].replays
        actual = decoder.respond(request(policy, name))
        steps = captured[0].replays - replays
    assert_same(actual, expected[name], 1e-5)
    assert (len(captured), len(ordinary)) == (2, 1)
    assert actual.counters.policy_tokens == len(PROMPT) + steps
    assert transfers.reads == steps + 1
    # The prompt, and every token that is not the one the device went on with: the first, drawn and forced ones.
    most = {"greedy": 2, "sample": 1 + steps, "ggro": steps / 2}
    assert 2 <= transfers.uploads <= most[name]


def test_captured_steps_of_lanes_cross_to_the_host_once(expected):
    captured = []

    def capture(function, device):
        captured.append(Replayed(function, device))
        return captured[-1]

    with pretend_gpu() as transfers, replaying(NAME, capture):
        policy, reward = policy_on(DEVICE), reward_on(CPU)
        decoder = DECODERS["ggro"](reward)
        decoder.speculate = 3
        decoder.respond(request(policy, "ggro"))
        transfers.clear()
        replays = sum(one.replays for one in captured)
        actual = decoder.respond(request(policy, "ggro"))
        steps = sum(one.replays for one in captured) - replays
    assert_same(actual, expected["ggro"], 1e-5)
    assert actual.counters.speculation_hits > 0
    # The prompt is a pass like any other.
    assert transfers.reads == transfers.uploads == steps + 1


@pytest.mark.parametrize("name", ["greedy", "sample", "best-of-n", "args", "cards", "cbs", "ggro"])
def test_generate_and_plain_calls_keep_to_the_device(name):
    rows = [PROMPT, [44, 45]]
    ids = torch.tensor([row if len(row) == 5 else [PAD] * 3 + row for row in rows])
    mask = (ids != PAD).long()
    with pretend_gpu():
        outputs = []
        for device in (CPU, DEVICE):
            policy, decoder = policy_on(device), DECODERS[name](reward_on(device))
            placed = {"attention_mask": mask.to(device), "max_new_tokens": 9}
            generated = policy.generate(ids.to(device), custom_generate=decoder, **placed)
            plain = decoder(policy, ids.to(device), **placed).sequences
            assert generated.device == plain.device == device
            assert generated.tolist() == plain.tolist()
            outputs.append(plain.tolist())
    assert outputs[0] == outputs[1]


def test_branches_packed_on_the_device_score_as_on_the_cpu():
    branches = [[7, 8, 9], [10], [11, 12]]
    logits = []
    with pretend_gpu() as transfers:
        for device in (CPU, DEVICE):
            policy = policy_on(device)
            policy.set_attn_implementation(PREFIX_ATTENTION)
            cache = RewindableCache(policy.config)
            with torch.no_grad():
                policy(torch.tensor([PROMPT], device=device), past_key_values=cache)
                transfers.clear()
                packed = pack_branches(branches, len(PROMPT), device)
                assert transfers.uploads == (device == DEVICE)
                logits.append(policy(**packed, past_key_values=cache).logits.cpu())
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)


def test_to_host_gives_the_bits_of_tensors_of_any_dtype():
    tensors = [
        torch.tensor([1.5, torch.nan, -torch.inf], dtype=torch.bfloat16),
        torch.tensor(2.0**-1074, dtype=torch.float64),
        torch.tensor([[7], [2**60]]),
        torch.tensor([True]),
        torch.tensor([], dtype=torch.float32),
        torch.arange(6.0)[::2],
    ]
    with pretend_gpu() as transfers:
        placed = [tensor.to(DEVICE) for tensor in tensors]
        transfers.clear()
        read = to_host(*placed)
    assert transfers.reads == 1
    for tensor, other in zip(tensors, read, strict=True):
        assert not isinstance(other, OnPretendGPU)
        torch.testing.assert_close(other, tensor, rtol=0, atol=0, equal_nan=True)


def test_the_benchmark_makes_its_weights_on_the_device():
    with pretend_gpu() as transfers:
        pair = gpu_decoding.build_pair("tiny", DEVICE, torch.bfloat16, prompt_tokens=20)
        models = (pair.policy, pair.reward.model)
        # Scalars, and the passes of the reward model's checks at load.
        assert transfers.uploads < sum(len(list(model.parameters())) for model in models)
        for model in models:
            assert {(x.device, x.dtype) for x in model.parameters()} == {(DEVICE, torch.bfloat16)}
        run = gpu_decoding.Run("tiny", "tiny")
        gpu_decoding.measure(pair, new_tokens=6, deadline=0.0, run=run)
    assert all(method.same_tokens_as_generate for name, method in run.methods.items() if name != "GGRO")


# The pretended GPU itself: a test on it can fail.


def test_it_refuses_what_a_gpu_refuses():
    with pretend_gpu():
        x = torch.ones(3, device=DEVICE)
        assert x.device.type == NAME
        assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]
        for mistake in (
            lambda: x + torch.ones(3),
            lambda: torch.cat([x, torch.ones(1)]),
            lambda: torch.nn.functional.embedding(torch.tensor([0]), x[:, None]),
            lambda: torch.ones(2, 3) @ x,
            lambda: x.index_select(0, torch.tensor([1])),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mistake()


def test_it_counts_every_way_to_read_and_to_write():
    with pretend_gpu() as transfers:
        x = torch.arange(3.0, device=DEVICE)
        for read in (x[0].item, lambda: float(x[1]), x.tolist, x.cpu, lambda: bool(x[2] > 0)):
            transfers.clear()
            read()
            assert (transfers.reads, transfers.uploads) == (1, 0)
        for upload in (lambda: torch.tensor([1], device=DEVICE), lambda: torch.ones(2).to(DEVICE)):
            transfers.clear()
            upload()
            assert (transfers.reads, transfers.uploads) == (0, 1)


def test_a_decoder_that_forgets_the_device_fails(monkeypatch):
    monkeypatch.setattr("ggro_hf.decode_step.to_device", lambda ids, device: torch.tensor(ids))
    with pretend_gpu(), pytest.raises(RuntimeError, match="same device"):
        Greedy().respond(request(policy_on(DEVICE)))


def test_a_decoder_that_reads_piece_by_piece_is_counted(monkeypatch):
    monkeypatch.setattr("ggro_hf.policy.to_host", lambda *tensors: [tensor.cpu() for tensor in tensors])
    with pretend_gpu() as transfers:
        policy = policy_on(DEVICE)
        transfers.clear()
        Greedy().respond(request(policy))
        assert transfers.reads == 4 * NEW_TOKENS


def _text_rewards_on(device):
    causal, encoder = gemma_like_tokenizer(), encoder_tokenizer()
    model = small_reward("gemma3", seed=1, vocabulary=len(causal), dtype=torch.float32)
    return TextReward(model.to(device), causal), EncoderReward(small_encoder(encoder).to(device), encoder)


def _text_scores(reward, after_pass=lambda: None):
    tokens = [small_tokenizer()(text)["input_ids"] for text in ("the", "and", " zebra")]
    scoring = reward.open(conversation(), Counters(), 20)
    for sequences in (1, 2, 2):
        yield scoring.score([tokens] * sequences)
        after_pass()
        scoring.keep([(0, 1), (0, 0)])


def test_rewards_that_read_text_are_read_once_a_pass():
    expected = [list(_text_scores(reward)) for reward in _text_rewards_on(CPU)]
    with pretend_gpu() as transfers:
        reads = []

        def note():
            reads.append(transfers.reads)
            transfers.clear()

        rewards = _text_rewards_on(DEVICE)
        transfers.clear()
        actual = [list(_text_scores(reward, note)) for reward in rewards]
    assert reads == [1] * 6
    for got, wanted in zip(actual, expected, strict=True):
        for step, same in zip(got, wanted, strict=True):
            assert [pytest.approx(row, abs=1e-5) for row in same] == step


def _head_rewards_on(device):
    model = small_reward("mistral", seed=1, vocabulary=300, dtype=torch.float32).to(device)
    backbone = LoadedBackbone.from_model(model, small_tokenizer())
    language_models = [small_policy(seed=seed, vocabulary=300, dtype=torch.float32).to(device) for seed in (2, 3)]
    return HeadReward(backbone), ProcessReward(backbone, EndedSteps()), ImplicitReward(*language_models)


def test_heads_steps_and_log_probabilities_are_read_once_a_pass_of_a_model():
    expected = [list(_text_scores(reward)) for reward in _head_rewards_on(CPU)]
    with pretend_gpu() as transfers:
        reads = []

        def note():
            reads.append(transfers.reads)
            transfers.clear()

        rewards = _head_rewards_on(DEVICE)
        transfers.clear()
        actual = [list(_text_scores(reward, note)) for reward in rewards]
    assert reads == [1] * 6 + [2] * 3
    for got, wanted in zip(actual, expected, strict=True):
        for step, same in zip(got, wanted, strict=True):
            assert [pytest.approx(row, abs=1e-5) for row in same] == step
