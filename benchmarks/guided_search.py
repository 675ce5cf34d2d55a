"""Reward-guided search against straightforward implementations of it on transformers.

    python -m benchmarks.guided_search [--vocabulary 32000 128256] [--embedded] [--search ARGS ...] [--prompt 128]
                                       [--threads 1 2] [--rounds 3] [--memory] [--json FILE]

Policy and reward model are Llama-shaped, 512 wide, 6 layers, fp32, random; 64 new tokens, without end-of-sequence.
`--embedded` adds the demo's models, with their own prompt. The baselines are in benchmarks/baselines; settings are
equal on both sides, those of the papers where they name any. ARGS must give the same tokens,
everything else draws its own. Searches whose work depends on what they draw decode four responses.

Rounds are interleaved, figures are medians. Tokens are those that go through the models, counted by hooks in a run of
their own, the first; a row of a batch counts like any other. "reward KV" is the largest KV cache that the reward model
was given, unused room included. Peak memory (`--memory`) is the growth over the loaded models, on one thread.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.baselines import args, best_of_n, cards, chunk_beam_search
from benchmarks.memory import last_number_printed_by, peak_growth
from benchmarks.pairs import NEW_TOKENS, PROMPT_TOKENS, Pair, build_embedded_pair, build_pair, respond
from benchmarks.rounds import interleaved, write_results
from ggro_hf import ARGS, CARDS, BestOfN, ChunkBeamSearch, Decoder, RejectionSampling

SEARCHES = ("ARGS", "CBS", "TBS", "CARDS", "rejection sampling", "best-of-N")
RESPONSES = 4
"""Of searches whose work depends on what they draw."""


@dataclass(frozen=True)
class Decoded:
    """The tokens of all responses of a run, and how many candidates were drawn for them where that varies."""

    token_ids: list[int]
    candidates: int | None = None


Run = Callable[[], Decoded]


def runs_of(search: str, pair: Pair) -> dict[str, Run]:
    """The ways to run a search, baselines first.

    Raises:
        ValueError: there is no such search.
    """
    baseline = {
        "policy": pair.policy,
        "reward": pair.reward.model,
        "prompt_ids": pair.prompt,
        "max_new_tokens": NEW_TOKENS,
    }
    match search:
        case "ARGS":
            settings: dict[str, Any] = {"weight": 1.5, "candidates": 30}
            copies = partial(args.decode, **baseline, **settings)
            return {
                "ARGS, released, 30 copies": lambda: Decoded(copies(rows=30)),
                "ARGS, released, 5 copies": lambda: Decoded(copies(rows=5)),
                "ARGS": partial(_respond, pair, ARGS(pair.reward, **settings)),
            }
        case "CBS" | "TBS":
            settings = {"width": 8, "successors": 8, "chunk_length": 30}
            if search == "TBS":
                settings = {"width": 2, "successors": 2, "chunk_length": 1}
            settings |= {"temperature": 1.0, "top_k": 50}
            rows = partial(chunk_beam_search.decode, **baseline, **settings, seed=0)
            return {
                f"{search}, rows": lambda: Decoded(rows()),
                search: partial(_respond, pair, ChunkBeamSearch(pair.reward, **settings)),
            }
        case "CARDS" | "rejection sampling":
            settings = {"reward_threshold": _reward_to_reach(pair), "temperature": 0.7, "top_k": 40, "attempts": 20}
            segments = {"entropy_threshold": pair.threshold, "alpha": 0.5, "max_segment": 64}
            if search == "CARDS":
                decoder: Decoder = CARDS(pair.reward, **settings, **segments)
            else:
                decoder = RejectionSampling(pair.reward, **settings)
                segments = {"entropy_threshold": float("inf"), "alpha": 1.0, "max_segment": NEW_TOKENS}
            one = partial(cards.decode, **baseline, **settings, **segments)
            return {
                f"{search}, one after another": partial(_decode_each, one),
                search: partial(_respond, pair, decoder, RESPONSES),
            }
        case "best-of-N":
            settings = {"samples": 16, "temperature": 1.0, "top_k": 50}
            batch = partial(best_of_n.decode, **baseline, **settings, seed=0)
            return {
                "best-of-N, generate": lambda: Decoded(batch()),
                "best-of-N": partial(_respond, pair, BestOfN(pair.reward, **settings)),
            }
    raise ValueError(f"search is {search!r}, but must be one of {', '.join(SEARCHES)}")


def _respond(pair: Pair, decoder: Decoder, responses: int = 1) -> Decoded:
    generations = [respond(decoder, pair.policy, pair.prompt, row) for row in range(responses)]
    candidates = sum(len(segment.candidates) for generation in generations for segment in generation.trace.segments)
    tokens = [token for generation in generations for token in generation.token_ids]
    return Decoded(tokens, candidates if responses > 1 else None)


def _decode_each(decode: Callable[..., tuple[list[int], int]]) -> Decoded:
    responses = [decode(seed=seed) for seed in range(RESPONSES)]
    tokens = [token for token_ids, _ in responses for token in token_ids]
    return Decoded(tokens, sum(candidates for _, candidates in responses))


def _reward_to_reach(pair: Pair) -> float:
    """That of the best of four samples: low enough to be reached, high enough for rejections."""
    reward = respond(BestOfN(pair.reward, samples=4, top_k=40), pair.policy, pair.prompt).reward
    assert reward is not None
    return reward


@dataclass
class Work:
    """What went through the models, and the largest KV cache of the reward model in bytes."""

    policy_tokens: int = 0
    reward_tokens: int = 0
    reward_cache_bytes: int = 0


@contextmanager
def counted(pair: Pair) -> Iterator[Work]:
    """Count what the two models do within the context."""
    work = Work()

    def count_policy(module: nn.Module, positional: Any, options: dict[str, Any], output: Any) -> None:
        work.policy_tokens += _tokens(positional, options)

    def count_reward(module: nn.Module, positional: Any, options: dict[str, Any], output: Any) -> None:
        work.reward_tokens += _tokens(positional, options)
        cache = options.get("past_key_values")
        if cache is not None:
            buffers = [buffer for layer in cache.layers for buffer in (layer.keys, layer.values)]
            work.reward_cache_bytes = max(work.reward_cache_bytes, sum(buffer.nbytes for buffer in buffers))

    handles = (
        pair.policy.base_model.register_forward_hook(count_policy, with_kwargs=True),
        pair.reward.model.base_model.register_forward_hook(count_reward, with_kwargs=True),
    )
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


def _tokens(positional: Any, options: dict[str, Any]) -> int:
    """Of one call of a backbone, which gets ids or embeddings."""
    embeddings = options.get("inputs_embeds")
    if embeddings is not None:
        return embeddings.shape[0] * embeddings.shape[1]
    return options["input_ids"].numel() if "input_ids" in options else positional[0].numel()


def work_of(runs: dict[str, Run], pair: Pair) -> dict[str, Work]:
    """The work of every run, each of which is done once."""
    works = {}
    for name, run in runs.items():
        with counted(pair) as works[name]:
            run()
    return works


def speeds_of(search: str, runs: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Speeds of every run.

    Raises:
        AssertionError: two ways to run ARGS gave different tokens.
    """
    measured = interleaved(runs, rounds)
    if search == "ARGS":
        assert len({tuple(decoded.token_ids) for decoded, _ in measured.values()}) == 1, "ARGS: tokens differ"
    speeds = {}
    for name, (decoded, seconds) in measured.items():
        speeds[name] = {"tokens_per_second": len(decoded.token_ids) / seconds}
        if decoded.candidates is not None:
            speeds[name]["candidates"] = decoded.candidates
            speeds[name]["candidates_per_second"] = decoded.candidates / seconds
    return speeds


def format_rows(title: str, rows: dict[str, dict[str, Any]]) -> str:
    """One line a way; ratios against the first."""
    lines = [
        f"\n{title}",
        f"{'':40}{'tokens/s':>10}{'ratio':>8}{'policy':>9}{'reward':>9}{'reward KV MB':>14}{'peak MB':>9}"
        f"{'candidates':>12}{'per s':>8}{'ratio':>8}",
    ]
    first = next(iter(rows.values()))
    for name, row in rows.items():
        speed, peak = row["tokens_per_second"], row.get("peak_bytes")
        line = (
            f"{name:40}{speed:10.2f}{speed / first['tokens_per_second']:8.2f}{row['policy_tokens']:9}"
            f"{row['reward_tokens']:9}{row['reward_cache_bytes'] / 1e6:14.1f}"
            f"{'' if peak is None else format(peak / 1e6, '.0f'):>9}"
        )
        if "candidates" in row:
            rate = row["candidates_per_second"]
            line += f"{row['candidates']:12}{rate:8.2f}{rate / first['candidates_per_second']:8.2f}"
        lines.append(line)
    return "\n".join(lines)


def build(vocabulary: int | None, prompt_tokens: int) -> Pair:
    """The random pair of a vocabulary, or the embedded one, which has its own prompt."""
    return build_embedded_pair() if vocabulary is None else build_pair(vocabulary, prompt_tokens)


def peak_bytes(vocabulary: int | None, prompt_tokens: int, search: str, name: str) -> int:
    """Peak memory of one run over the loaded models."""
    models = ["--embedded", "--vocabulary"] if vocabulary is None else ["--vocabulary", str(vocabulary)]
    run = ["--prompt", str(prompt_tokens), "--search", search, "--peak-of", name]
    return last_number_printed_by("benchmarks.guided_search", *models, *run)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.guided_search", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[32_000, 128_256], metavar="TOKENS")
    parser.add_argument("--embedded", action="store_true", help="the demo's models as well")
    parser.add_argument("--search", nargs="+", default=SEARCHES, choices=SEARCHES)
    parser.add_argument("--prompt", type=int, default=PROMPT_TOKENS, metavar="TOKENS")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="peak memory too, each way in a process of its own")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    sizes: list[int | None] = [*([None] if arguments.embedded else []), *arguments.vocabulary]
    if arguments.peak_of:
        torch.set_num_threads(1)
        run = runs_of(arguments.search[0], build(sizes[0], arguments.prompt))[arguments.peak_of]
        print(peak_growth(run))
        return 0
    results = []
    torch.set_num_threads(arguments.threads[0])
    for vocabulary in sizes:
        pair = build(vocabulary, arguments.prompt)
        models = "embedded pair" if vocabulary is None else f"vocabulary {vocabulary}"
        for search in arguments.search:
            runs = runs_of(search, pair)
            known: dict[str, dict[str, Any]] = {name: asdict(work) for name, work in work_of(runs, pair).items()}
            if arguments.memory:
                for name in runs:
                    known[name]["peak_bytes"] = peak_bytes(vocabulary, arguments.prompt, search, name)
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                speeds = speeds_of(search, runs, arguments.rounds)
                rows = {name: known[name] | speeds[name] for name in runs}
                print(format_rows(f"{search}, {models}, {threads} thread(s)", rows), flush=True)
                results.append({"models": models, "search": search, "threads": threads, "runs": rows})
    if arguments.json:
        write_results(arguments.json, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
