"""Decoding by models of real sizes on one GPU, and where the time of a step goes.

    python -m benchmarks.gpu_decoding [--size 1b 3b 8b] [--prompt 256] [--new-tokens 64] [--seconds 240] [--compile 180]

Policies have the shapes of Llama 3 with a head of their own, and random weights that are made on the device in the
dtype they compute in; the reward model has the 1B shape. Rates are medians of interleaved rounds. The parts of a
response come from one more run with a stopwatch (benchmarks/stopwatch.py): "host" is what is left of the wall time,
Python, transfers and launches between the parts. Device time is the sum over all kernels of a short run under
torch.profiler, whose own cost is in that run's wall time: compare it with the parts, not with it. Then the step of a
token by itself (benchmarks/gpu_step.py): as ordinary passes, captured, and the bare forward, captured and compiled.
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.autograd import DeviceType
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from benchmarks.gpu_step import Step, format_step, measure_step
from benchmarks.report import commit, installed
from benchmarks.session import ROOT
from benchmarks.stopwatch import PARTS, Stopwatch, timed
from ggro_hf import GGRO, Decoder, Greedy, RewardModel
from ggro_hf.decoding.base import Request
from ggro_hf.results import Generation
from ggro_kernels.info import capabilities

# (width, layers, query heads, key heads, feed-forward width, vocabulary)
SHAPES = {
    "tiny": (64, 2, 4, 2, 128, 1000),
    "1b": (2048, 16, 32, 8, 8192, 128_256),
    "3b": (3072, 28, 24, 8, 8192, 128_256),
    "8b": (4096, 32, 32, 8, 14_336, 128_256),
}
REWARD_OF = {"tiny": "tiny"} | dict.fromkeys(("1b", "3b", "8b"), "1b")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Standard deviation of random logits: entropies are then a few nats, as a real model's.
LOGIT_SPREAD = 3.6
# The share of greedy tokens whose entropy does not end a segment.
BELOW_THRESHOLD = 0.7
# Of GGRO.
CANDIDATES = 25
WARM_UP_TOKENS, PROFILED_TOKENS, MOST_ROUNDS = 8, 16, 5

GENERATE = "transformers generate, greedy"


@dataclass(frozen=True)
class Pair:
    """A policy that never ends by itself, a reward model, and a prompt."""

    policy: PreTrainedModel
    reward: RewardModel
    prompt: list[int]

    @property
    def device(self) -> torch.device:
        return self.policy.device


@dataclass
class Method:
    """What one method did with one prompt; bytes and device time are None without a GPU."""

    tokens_per_second: float
    rounds: int
    policy_tokens: int | None
    reward_forward_tokens: int | None
    reward_backward_tokens: int | None
    segments: int | None
    candidates: int | None
    same_tokens_as_generate: bool
    peak_bytes: int | None
    # Of the run with a stopwatch, and how often each part ran in it.
    wall_seconds: float
    seconds: dict[str, float]
    calls: dict[str, int]
    # Of the short run under the profiler.
    profiled_tokens: int | None = None
    profiled_device_seconds: float | None = None
    profiled_kernels: int | None = None


@dataclass
class Run:
    """All methods on one size, or why there are none."""

    size: str
    reward_size: str
    parameters: int = 0
    reward_parameters: int = 0
    entropy_threshold: float = 0.0
    methods: dict[str, Method] = field(default_factory=dict)
    step: Step | None = None
    error: str | None = None


def llama_config(size: str, **changes: Any) -> LlamaConfig:
    """The shape of a size."""
    width, layers, heads, key_heads, inner, vocabulary = SHAPES[size]
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=width // heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **changes,
    )


def build_pair(size: str, device: torch.device, dtype: torch.dtype, prompt_tokens: int) -> Pair:
    """Seeded models whose weights never leave the device."""
    torch.manual_seed(0)
    policy_config, reward_config = llama_config(size), llama_config(REWARD_OF[size], num_labels=1)
    with torch.device(device):
        policy = AutoModelForCausalLM.from_config(policy_config, dtype=dtype)
        reward = AutoModelForSequenceClassification.from_config(reward_config, dtype=dtype)
    with torch.no_grad():
        policy.lm_head.weight.normal_(std=LOGIT_SPREAD / policy_config.hidden_size**0.5)
    prompt = torch.randint(3, policy_config.vocab_size, (prompt_tokens,), device="cpu").tolist()
    return Pair(policy.eval().requires_grad_(False), RewardModel(reward), prompt)


def respond(decoder: Decoder, pair: Pair, new_tokens: int) -> Generation:
    """One response of a decoder, without end-of-sequence."""
    return decoder.respond(Request(pair.policy, list(pair.prompt), new_tokens, frozenset()))


def generate(pair: Pair, new_tokens: int) -> list[int]:
    """The same tokens by transformers' own greedy search."""
    ids = torch.tensor([pair.prompt], device=pair.device)
    output = pair.policy.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_cache=True
    )
    return output[0, len(pair.prompt) :].tolist()


Respond = Callable[[int], Generation | list[int]]
"""Decodes that many tokens."""


def methods(pair: Pair, threshold: float) -> dict[str, Respond]:
    """Every method as a function of the number of tokens."""
    decoders = {
        "Greedy": Greedy(),
        "GGRO, never intervening": GGRO(pair.reward, entropy_threshold=float("inf"), refinements=1),
        "GGRO": GGRO(pair.reward, entropy_threshold=threshold),
    }
    return {
        GENERATE: lambda tokens: generate(pair, tokens),
        **{
            name: (lambda tokens, decoder=decoder: respond(decoder, pair, tokens)) for name, decoder in decoders.items()
        },
    }


def token_ids(response: Generation | list[int]) -> list[int]:
    """The tokens of a response of any method."""
    return response if isinstance(response, list) else response.token_ids


def measure(pair: Pair, new_tokens: int, deadline: float, run: Run) -> None:
    """Fill in `run`: at least one round, and more until the deadline (of `perf_counter`)."""
    entropies = sorted(respond(Greedy(), pair, new_tokens).trace.entropies)
    run.entropy_threshold = entropies[int(BELOW_THRESHOLD * len(entropies))]
    ways = methods(pair, run.entropy_threshold)
    for respond_with in ways.values():
        respond_with(min(WARM_UP_TOKENS, new_tokens))

    responses: dict[str, Generation | list[int]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int | None] = {}
    for _ in range(MOST_ROUNDS):
        for name, respond_with in ways.items():
            reset_peak(pair.device)
            start = perf_counter()
            responses[name] = respond_with(new_tokens)
            seconds[name].append(perf_counter() - start)
            peaks[name] = peak_bytes(pair.device)
        if perf_counter() > deadline:
            break

    expected = token_ids(responses[GENERATE])
    for name, respond_with in ways.items():
        stopwatch = Stopwatch(pair.device)
        with timed(stopwatch, pair.policy, pair.reward):
            start = perf_counter()
            response = respond_with(new_tokens)
            wall = perf_counter() - start
        parts, calls = stopwatch.seconds(), stopwatch.calls()
        counters = None if isinstance(response, list) else response.counters
        segments = None if isinstance(response, list) else response.trace.segments
        run.methods[name] = Method(
            tokens_per_second=new_tokens / statistics.median(seconds[name]),
            rounds=len(seconds[name]),
            policy_tokens=counters and counters.policy_tokens,
            reward_forward_tokens=counters and counters.reward_forward_tokens,
            reward_backward_tokens=counters and counters.reward_backward_tokens,
            segments=None if segments is None else len(segments),
            candidates=None if segments is None else sum(len(segment.candidates) for segment in segments),
            same_tokens_as_generate=token_ids(responses[name]) == expected,
            peak_bytes=peaks[name],
            wall_seconds=wall,
            seconds={part: parts.get(part, 0.0) for part in PARTS} | {"host": wall - sum(parts.values())},
            calls={part: calls.get(part, 0) for part in PARTS},
        )
        profile(run.methods[name], respond_with, min(PROFILED_TOKENS, new_tokens), pair.device)


def profile(method: Method, respond_with: Respond, tokens: int, device: torch.device) -> None:
    """Add what torch.profiler saw of the GPU, if it sees one."""
    if device.type != "cuda":
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        respond_with(tokens)
        torch.cuda.synchronize(device)
    kernels = [
        event for event in profiler.events() if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    # Without the right to read the GPU's counters the profiler sees nothing.
    if kernels:
        method.profiled_tokens, method.profiled_kernels = tokens, len(kernels)
        method.profiled_device_seconds = sum(kernel.self_device_time_total for kernel in kernels) / 1e6


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory that tensors, weights included, took since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def measure_size(
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    prompt_tokens: int,
    new_tokens: int,
    seconds: float,
    compile_seconds: float,
) -> Run:
    """All methods on one size, and the step by itself; a GPU that is too small is part of the result."""
    run = Run(size, REWARD_OF[size])
    deadline = perf_counter() + seconds
    try:
        pair = build_pair(size, device, dtype, prompt_tokens)
        run.parameters, run.reward_parameters = pair.policy.num_parameters(), pair.reward.model.num_parameters()
        measure(pair, new_tokens, deadline, run)
        run.step = measure_step(pair.policy, pair.prompt, CANDIDATES, compile_seconds)
    except torch.OutOfMemoryError as error:
        run.error = str(error).partition("\n")[0]
    return run


def format_run(run: Run, new_tokens: int) -> str:
    """A table of rates, then one of milliseconds per generated token and part."""
    lines = [f"\n{run.size} policy, {run.reward_size} reward model"]
    if run.error is not None:
        return "\n".join([*lines, f"  {run.error}"])
    lines.append(
        f"{'method':30} {'tokens/s':>9} {'policy':>7} {'reward':>7} {'backward':>9} {'candidates':>11} {'peak GB':>8} "
        f"{'as generate':>12}"
    )
    for name, method in run.methods.items():
        counts = (method.policy_tokens, method.reward_forward_tokens, method.reward_backward_tokens, method.candidates)
        policy, forward, backward, candidates = ("" if count is None else count for count in counts)
        peak = "" if method.peak_bytes is None else f"{method.peak_bytes / 1e9:.1f}"
        same = "yes" if method.same_tokens_as_generate else "no"
        lines.append(
            f"{name:30} {method.tokens_per_second:9.1f} {policy:>7} {forward:>7} {backward:>9} {candidates:>11} "
            f"{peak:>8} {same:>12}"
        )
    columns = (*PARTS, "host")
    lines.append(
        f"\n{'ms per new token (per call)':30} " + " ".join(f"{part:>20}" for part in columns) + f" {'device':>8}"
    )
    for name, method in run.methods.items():
        cells = []
        for part in columns:
            calls = method.calls.get(part)
            per_call = f" ({1e3 * method.seconds[part] / calls:.3f})" if calls else ""
            cells.append(f"{1e3 * method.seconds[part] / new_tokens:.3f}{per_call}")
        busy = method.profiled_device_seconds
        device = f"{1e3 * busy / method.profiled_tokens:.3f}" if busy and method.profiled_tokens else "-"
        lines.append(f"{name:30} " + " ".join(f"{cell:>20}" for cell in cells) + f" {device:>8}")
    if run.step is not None:
        lines.append(f"\n{format_step(run.step)}")
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    """What the device is called; on a CPU, "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_decoding", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["1b", "3b", "8b"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--prompt", type=int, default=256, metavar="TOKENS", help="length of the prompt (256)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="TOKENS", help="length of a response (64)")
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="for all sizes; each gets one round, however long (240)"
    )
    parser.add_argument(
        "--compile", type=float, default=180.0, metavar="SECONDS", help="for compiling a forward, 0 for none (180)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON (benchmarks/results/GPU/decoding.json where all sizes run)"
    )
    arguments = parser.parse_args(argv)
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU: --device cpu --size tiny tries the program without one")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = arguments.device
    print(f"{device_name(device)}, {arguments.dtype}, {arguments.prompt} + {arguments.new_tokens} tokens", flush=True)
    runs = []
    end = perf_counter() + arguments.seconds
    for place, size in enumerate(arguments.size):
        share = (end - perf_counter()) / (len(arguments.size) - place)
        dtype, lengths = DTYPES[arguments.dtype], (arguments.prompt, arguments.new_tokens)
        runs.append(measure_size(size, device, dtype, *lengths, share, arguments.compile))
        print(format_run(runs[-1], arguments.new_tokens), flush=True)
        if device.type == "cuda":
            # The next pair needs the memory of this one.
            gc.collect()
            torch.cuda.empty_cache()
    report = {
        "device": device_name(device),
        "dtype": arguments.dtype,
        "prompt_tokens": arguments.prompt,
        "new_tokens": arguments.new_tokens,
        "versions": {
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "triton": installed("triton"),
        },
        "kernels": capabilities()["ops"],
        "commit": commit(),
        "runs": [asdict(run) for run in runs],
    }
    full = device.type == "cuda" and set(arguments.size) >= {"1b", "3b", "8b"}
    directory = device_name(device).lower().replace(" ", "-")
    output = arguments.output or (ROOT / "benchmarks" / "results" / directory / "decoding.json" if full else None)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"\nwrote {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
