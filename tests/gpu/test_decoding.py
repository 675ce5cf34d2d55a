"""Whole models on a GPU: the tokens of the CPU in fp32, models apart, bf16, and the benchmark on a tiny pair."""

import json
import math
import warnings

import pytest
import torch

from benchmarks import gpu_decoding
from benchmarks.stopwatch import PARTS
from ggro_hf import Greedy
from ggro_hf.cli import main
from ggro_hf.decoding.base import peak_bytes
from ggro_hf.transfer import Transfer
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
from tests.ggro_hf.small_models import PAD

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

# With its index, as tensors name it.
GPU = torch.device("cuda", 0)
PLACES = {"both": (GPU, GPU), "policy": (GPU, CPU), "reward": (CPU, GPU)}


@pytest.fixture(scope="module")
def expected():
    """What every decoder answers on the CPU."""
    policy, reward = policy_on(CPU), reward_on(CPU)
    return {name: make(reward).respond(request(policy, name)) for name, make in DECODERS.items()}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", DECODERS)
def test_the_cpus_tokens_wherever_the_models_are(expected, name, place):
    policy_device, reward_device = PLACES[place]
    policy, reward = policy_on(policy_device), reward_on(reward_device)
    # The draws come from a generator on the CPU, so samples are the same as well.
    assert_same(DECODERS[name](reward).respond(request(policy, name)), expected[name], 1e-4)


def test_greedy_equals_generate_in_fp32():
    policy = policy_on(GPU)
    ids = torch.tensor([PROMPT], device=GPU)
    generated = policy.generate(ids, do_sample=False, max_new_tokens=40, pad_token_id=PAD)
    sequences = Greedy()(policy, ids, max_new_tokens=40).sequences
    assert sequences.device == GPU
    assert torch.equal(sequences, generated)


@pytest.mark.parametrize("name", ["greedy", "sample", "best-of-n", "ggro"])
def test_generate_with_a_left_padded_batch(name):
    rows = [PROMPT, [44, 45]]
    ids = torch.tensor([row if len(row) == len(PROMPT) else [PAD] * 3 + row for row in rows])
    mask = (ids != PAD).long()
    outputs = []
    for device in (CPU, GPU):
        decoder = DECODERS[name](reward_on(device))
        options = {"attention_mask": mask.to(device), "max_new_tokens": 9, "custom_generate": decoder}
        output = policy_on(device).generate(ids.to(device), **options)
        assert output.device == device or device == CPU
        outputs.append(output.tolist())
    assert outputs[0] == outputs[1]


def test_a_stream_of_the_caller(expected):
    policy, reward = policy_on(GPU), reward_on(GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        generation = DECODERS["ggro"](reward).respond(request(policy))
    assert_same(generation, expected["ggro"], 1e-4)


@pytest.mark.parametrize("name", ["greedy", "sample"])
def test_a_token_waits_for_the_gpu_once(name, monkeypatch):
    policy, decoder = policy_on(GPU), DECODERS[name](reward_on(GPU))
    decoder.respond(request(policy))
    waited = []
    wait = Transfer.wait
    monkeypatch.setattr(Transfer, "wait", lambda transfer: waited.append(transfer) or wait(transfer))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generation = decoder.respond(request(policy))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]
    assert len(generation.token_ids) == NEW_TOKENS
    assert not waits
    assert len(waited) == NEW_TOKENS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DECODERS)
def test_half_precision_runs_end_to_end(name, dtype):
    policy, reward = policy_on(GPU, dtype), reward_on(GPU, dtype)
    generation = DECODERS[name](reward).respond(request(policy, name))
    assert generation.token_ids
    assert all(math.isfinite(entropy) and entropy >= 0 for entropy in generation.trace.entropies)
    if generation.reward is not None and "released" not in name:
        plain = reward.score(PROMPT + generation.token_ids)
        assert generation.reward == pytest.approx(plain, abs=0.15 * max(1.0, abs(plain)))
    for segment in generation.trace.segments:
        assert all(math.isfinite(candidate.reward) for candidate in segment.candidates)


def test_peak_memory_is_that_of_the_gpu():
    policy = policy_on(GPU)
    torch.cuda.reset_peak_memory_stats()
    counters = Greedy().respond(request(policy)).counters
    weights = sum(parameter.nbytes for parameter in policy.parameters())
    assert weights < counters.peak_bytes <= peak_bytes(GPU) < torch.cuda.mem_get_info()[1]


def test_the_command_answers_as_on_the_cpu(tmp_path):
    rows = []
    for device in ("cpu", "cuda"):
        output = tmp_path / f"{device}.jsonl"
        arguments = ["--prompt", "The director", "--max-new-tokens", "16", "--device", device, "--output", str(output)]
        assert main(["generate", *arguments]) == 0
        rows.append(json.loads(output.read_text(encoding="utf-8").splitlines()[-1]))
    assert rows[0]["token_ids"] == rows[1]["token_ids"]
    assert rows[0]["reward"] == pytest.approx(rows[1]["reward"], abs=1e-3)


def test_the_benchmark_on_a_tiny_pair(tmp_path):
    output = tmp_path / "decoding.json"
    arguments = [
        "--size",
        "tiny",
        "--prompt",
        "64",
        "--new-tokens",
        "16",
        "--seconds",
        "0",
        "--compile",
        "0",
        "--output",
        str(output),
    ]
    assert gpu_decoding.main(arguments) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["device"] == torch.cuda.get_device_name()
    (run,) = report["runs"]
    assert run["error"] is None
    for method in run["methods"].values():
        assert method["peak_bytes"] > 2 * (run["parameters"] + run["reward_parameters"])
        assert sum(method["seconds"].values()) == pytest.approx(method["wall_seconds"])
        assert all(method["seconds"][part] > 0 for part in PARTS if method["calls"][part])
        # Containers may forbid the profiler what it needs.
        if method["profiled_kernels"]:
            assert method["profiled_device_seconds"] > 0
