"""One token of a policy: ordinary passes, the captured step, and the bare forward to hold it against."""

import signal
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel, StaticCache

from ggro_hf import step_pool
from ggro_hf.graphs import CAPTURES
from ggro_hf.policy import Policy
from ggro_hf.reading import Position, TopK
from ggro_hf.results import Counters
from ggro_hf.transfer import to_device, wait_for

WARM_UP, TOKENS, ROUNDS = 4, 16, 5


@dataclass
class Step:
    """Milliseconds a token, medians of interleaved rounds; None for what did not run, and why."""

    ordinary: float
    captured: float | None
    running_ahead: float | None
    # Forward passes one after another, nothing read.
    captured_forward: float | None
    compiled_forward: float | None
    decoded_by: str
    compile_error: str | None = None
    compile_seconds: float | None = None

    @property
    def over_bare(self) -> float | None:
        """A token of greedy decoding over the compiled forward alone."""
        if self.running_ahead is None or self.compiled_forward is None:
            return None
        return self.running_ahead / self.compiled_forward


def measure_step(model: PreTrainedModel, prompt: list[int], k: int, compile_seconds: float) -> Step:
    """Measure a model; the forward is compiled if that takes no longer than `compile_seconds`, 0 for not at all."""
    device = model.device
    ways: dict[str, Callable[[], object]] = {}
    with mock.patch.dict(CAPTURES):
        CAPTURES.pop(device.type, None)
        ways["ordinary"] = _decode(_opened(model, prompt, k), run_ahead=False)
    captured = _opened(model, prompt, k)
    captured.extend(captured.position.tokens[:1])
    step = captured._slot.step
    if step is not None:
        ways["captured"] = _decode(captured, run_ahead=False)
        ways["running_ahead"] = _decode(_opened(model, prompt, k), run_ahead=True)
        ways["captured_forward"] = step._forward.replay
    error = took = None
    if compile_seconds > 0:
        try:
            start = perf_counter()
            with _at_most(compile_seconds):
                ways["compiled_forward"] = _compiled(model, prompt)
            took = perf_counter() - start
        # Whatever keeps it from compiling, the rest is worth reporting.
        except Exception as exception:
            error = f"{type(exception).__name__}: {exception}".partition("\n")[0]
    seconds = _interleaved(ways, device)
    milliseconds = {name: 1e3 * seconds[name] if name in seconds else None for name in _TIMED}
    return Step(**milliseconds, decoded_by=step_pool.describe(model), compile_error=error, compile_seconds=took)


_TIMED = ("ordinary", "captured", "running_ahead", "captured_forward", "compiled_forward")


def format_step(step: Step) -> str:
    """A line for people."""
    cells = [f"{name.replace('_', ' ')} {ms:.2f}" for name in _TIMED if (ms := getattr(step, name)) is not None]
    line = f"ms per token: {', '.join(cells)} (decoded by {step.decoded_by})"
    if step.over_bare is not None:
        line += f"; running ahead over the compiled forward alone {step.over_bare:.2f}x"
    return line + (f"; compiled forward: {step.compile_error}" if step.compile_error else "")


def _opened(model: PreTrainedModel, prompt: list[int], k: int) -> Policy[Position]:
    room = len(prompt) + (WARM_UP + TOKENS) * (ROUNDS + 1)
    policy = Policy(model, Counters(), TopK(k), capacity=room)
    policy.extend(list(prompt))
    return policy


def _decode(policy: Policy[Position], *, run_ahead: bool) -> Callable[[], object]:
    return lambda: policy.extend(policy.position.tokens[:1], run_ahead=run_ahead)


def _compiled(model: PreTrainedModel, prompt: list[int]) -> Callable[[], object]:
    """transformers' own static cache, behind a forward compiled for one token."""
    device = model.device
    cache = StaticCache(config=model.config, max_cache_len=len(prompt) + (WARM_UP + TOKENS) * (ROUNDS + 1))
    forward: Any = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    token, position = to_device([[prompt[-1]]], device), to_device([[len(prompt)]], device)

    @torch.inference_mode()
    def run() -> object:
        return forward(
            input_ids=token, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits

    with torch.inference_mode():
        model(input_ids=to_device([prompt], device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    for _ in range(WARM_UP):
        run()
    wait_for(device)
    return run


@torch.inference_mode()
def _interleaved(ways: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            for _ in range(WARM_UP):
                run()
            wait_for(device)
            start = perf_counter()
            for _ in range(TOKENS):
                run()
            wait_for(device)
            seconds[name].append((perf_counter() - start) / TOKENS)
    return {name: statistics.median(times) for name, times in seconds.items()}


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
