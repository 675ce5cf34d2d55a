"""The benchmark of whole models: a tiny run on the CPU, and the parts it takes a response apart into."""

import json
from time import sleep

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import gpu_decoding
from benchmarks.gpu_decoding import GENERATE, build_pair, llama_config
from benchmarks.gpu_step import format_step, measure_step
from benchmarks.stopwatch import PARTS, Stopwatch, timed
from ggro_hf import GGRO, Greedy, step_pool
from ggro_hf.graphs import CAPTURES
from tests.ggro_hf.replayed import replaying

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair():
    return build_pair("tiny", CPU, torch.float32, prompt_tokens=12)


def test_a_tiny_run_prints_a_table_and_writes_what_it_measured(tmp_path, capsys):
    output = tmp_path / "new" / "decoding.json"
    arguments = ["--size", "tiny", "--device", "cpu", "--dtype", "float32", "--prompt", "20", "--new-tokens", "16"]
    assert gpu_decoding.main([*arguments, "--seconds", "0", "--compile", "0", "--output", str(output)]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    (run,) = report["runs"]
    assert run["error"] is None and run["parameters"] > run["reward_parameters"] > 0
    methods = run["methods"]
    assert list(methods) == [GENERATE, "Greedy", "GGRO, never intervening", "GGRO"]
    printed = capsys.readouterr().out
    for name, method in methods.items():
        assert name in printed
        assert method["rounds"] == 1
        assert method["tokens_per_second"] > 0
        assert method["same_tokens_as_generate"] or name == "GGRO"
        assert set(method["seconds"]) == {*PARTS, "host"}
        assert sum(method["seconds"].values()) == pytest.approx(method["wall_seconds"])
        assert all(seconds >= 0 for seconds in method["seconds"].values())
    assert run["step"]["ordinary"] > 0 and run["step"]["captured"] > 0
    assert "a recording of one" in printed
    assert methods["Greedy"]["policy_tokens"] == 20 + 16 - 1
    assert methods["GGRO"]["reward_backward_tokens"] > 0 and methods["GGRO"]["segments"] > 1


def test_every_pass_and_every_kernel_is_in_its_part(pair, monkeypatch):
    # Of a recording there is nothing to see but that it runs.
    monkeypatch.delitem(CAPTURES, "cpu")
    stopwatch = Stopwatch(CPU)
    decoder = GGRO(pair.reward, entropy_threshold=0.0, refinements=3, speculate=1)
    with timed(stopwatch, pair.policy, pair.reward):
        generation = gpu_decoding.respond(decoder, pair, 12)
    calls = stopwatch.calls()
    candidates = [c for segment in generation.trace.segments for c in segment.candidates]
    scored = sum(bool(c.proposals) for c in candidates)
    # The prompt, and every candidate; a backward pass only where another candidate could follow.
    assert calls["reward forward"] == 1 + len(candidates)
    assert calls["reward backward"] == scored > 0
    assert calls["kernels"] == calls["policy forward"] + scored
    assert calls["policy forward"] == 1 + generation.counters.policy_tokens - 12
    assert all(seconds > 0 for seconds in stopwatch.seconds().values())


def test_the_step_captured_beside_the_bare_forward(pair):
    with replaying():
        step = measure_step(pair.policy, pair.prompt, 5, compile_seconds=0.0)
        assert step_pool.describe(pair.policy) == step.decoded_by == "a recording of one"
    assert min(step.ordinary, step.captured, step.running_ahead, step.captured_forward) > 0
    assert step.compiled_forward is step.over_bare is None
    assert "running ahead" in format_step(step)


def test_compiling_is_given_up_in_time(pair, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_step._compiled", lambda *_: sleep(10))
    step = measure_step(pair.policy, pair.prompt, 5, compile_seconds=0.1)
    assert "TimeoutError: took more than" in format_step(step)


def test_the_stopwatch_leaves_nothing_behind(pair):
    stopwatch = Stopwatch(CPU)
    with timed(stopwatch, pair.policy, pair.reward):
        pass
    gpu_decoding.respond(GGRO(pair.reward), pair, 4)
    assert stopwatch.calls() == {}


def test_a_stopped_clock_tells_the_time_between(monkeypatch):
    now = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr("benchmarks.stopwatch.perf_counter", lambda: next(now))
    stopwatch = Stopwatch(CPU)
    for _ in range(2):
        stopwatch.start("part")
        stopwatch.stop("part")
    assert stopwatch.seconds() == {"part": 2.5} and stopwatch.calls() == {"part": 2}


def test_entropies_are_those_of_a_real_model(pair):
    entropies = gpu_decoding.respond(Greedy(), pair, 24).trace.entropies
    assert 1 < sum(entropies) / len(entropies) < 6


@pytest.mark.parametrize(("size", "billions"), [("1b", 1.5), ("3b", 3.6), ("8b", 8.0)])
def test_sizes_are_what_they_are_called(size, billions):
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(size))
    # The output head of the two small ones is one of its own here.
    assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.02)


def test_a_device_that_is_too_small_is_a_result(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(gpu_decoding, "build_pair", full)
    run = gpu_decoding.measure_size("tiny", CPU, torch.float32, 8, 4, seconds=0, compile_seconds=0)
    assert run.error == "CUDA out of memory. Tried to allocate"
    assert "out of memory" in gpu_decoding.format_run(run, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu_decoding.main([])
    assert "torch sees no GPU" in capsys.readouterr().err
