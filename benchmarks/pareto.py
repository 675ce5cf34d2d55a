"""What a response's gold reward costs: every guided method on the embedded models, all prompts, gold against tokens/s.

    python -m benchmarks.pareto [--prompts 48] [--new-tokens 48] [--threads 1] [--rounds 3] [--method NAME ...]
                                [--json FILE] [--plot FILE]

The gold model was trained on other data than the guiding one and steers nothing. Methods that can decode all prompts in
one batch do so. Rounds are interleaved and the seconds their median, so the first, which records passes, counts little;
methods that draw do so with one seed. The plot (PNG or SVG, by its name) needs matplotlib.

A second table says how well the reward's gradient, and how well the policy, ranks the tokens of a boundary: how often
the `m` best ranked hold the one whose segment the reward likes best, and how much of its gain over the policy's own
segment they get.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.pairs import build_embedded_pair
from benchmarks.rounds import interleaved, write_results
from ggro_hf import (
    ARGS,
    GGRO,
    BestOfN,
    ChunkBeamSearch,
    Decoder,
    ExhaustiveSearch,
    Generation,
    Greedy,
    RewardModel,
    Segment,
    demo_models,
    generate,
)
from ggro_hf.evaluation import MeanInterval, mean_interval
from ggro_hf.rewards import Conversation

THRESHOLD, CANDIDATES = 3.0, 25
TRIED = (2, 4, 8)
"""Refinements of GGRO, and tokens that a pruned search tries beside the policy's own."""

FAMILIES = ("greedy", "GGRO", "exhaustive", "likeliest", "pruned", "ARGS", "best-of-N", "CBS")
"""Methods that differ in one number share a line of the plot."""


def decoders(reward: RewardModel) -> dict[str, Decoder]:
    """Every point of the plot, by family and number."""
    search = partial(ExhaustiveSearch, reward, entropy_threshold=THRESHOLD)
    return {
        "greedy": Greedy(),
        **{
            f"GGRO, {n} refinements": GGRO(reward, entropy_threshold=THRESHOLD, refinements=n, candidates=CANDIDATES)
            for n in TRIED
        },
        "exhaustive": search(candidates=CANDIDATES),
        **{f"likeliest, {m} of them": search(candidates=m + 1) for m in TRIED},
        **{f"pruned, {m} by gradient": search(candidates=CANDIDATES, prune=m) for m in TRIED},
        "ARGS, 9 candidates": ARGS(reward, candidates=9),
        "best-of-N, 8": BestOfN(reward, samples=8),
        "CBS, 2 beams, 3 chunks of 8": ChunkBeamSearch(reward, width=2, successors=3, chunk_length=8),
    }


def measure(
    chosen: dict[str, Decoder], guide: RewardModel, gold: RewardModel, prompts: int, new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """A row of figures for every method."""
    pair = build_embedded_pair()
    # Its end-of-sequence ends a response here.
    pair.policy.generation_config.eos_token_id = pair.policy.config.eos_token_id
    texts = list(demo_models.PROMPTS[:prompts])
    runs: dict[str, Callable[[], list[Generation]]] = {
        name: partial(generate, pair.policy, pair.tokenizer, texts, decoder, max_new_tokens=new_tokens, progress=False)
        for name, decoder in chosen.items()
    }
    return [
        _figures(name, generations, seconds, pair.tokenizer, guide, gold)
        for name, (generations, seconds) in interleaved(runs, rounds).items()
    ]


def _figures(
    name: str,
    generations: list[Generation],
    seconds: float,
    tokenizer: PreTrainedTokenizerFast,
    guide: RewardModel,
    gold: RewardModel,
) -> dict[str, Any]:
    def scored(reward: RewardModel) -> MeanInterval:
        values = [
            reward.score_response(Conversation(one.prompt_ids, one.prompt, tokenizer), one.token_ids)
            for one in generations
        ]
        interval = mean_interval(values)
        assert interval is not None
        return interval

    counters = [one.counters for one in generations]
    tokens = sum(len(one.token_ids) for one in generations)
    guided, judged = scored(guide), scored(gold)
    return {
        "method": name,
        "gold": judged.mean,
        "gold_ci95": [judged.low, judged.high],
        "reward": guided.mean,
        "reward_ci95": [guided.low, guided.high],
        "tokens_per_second": tokens / seconds,
        "responses": len(generations),
        "tokens": tokens,
        "policy_tokens": fmean(counter.policy_tokens for counter in counters),
        "reward_forward_tokens": fmean(counter.reward_forward_tokens for counter in counters),
        "reward_backward_tokens": fmean(counter.reward_backward_tokens for counter in counters),
    }


def rankings(guide: RewardModel, prompts: int, new_tokens: int) -> list[dict[str, Any]]:
    """How well the tokens of a boundary are ranked, by the gradient and by the policy, from a search of all but one."""
    pair = build_embedded_pair()
    decoder = ExhaustiveSearch(guide, entropy_threshold=THRESHOLD, candidates=CANDIDATES, prune=CANDIDATES - 2)
    texts = list(demo_models.PROMPTS[:prompts])
    generations = generate(pair.policy, pair.tokenizer, texts, decoder, max_new_tokens=new_tokens, progress=False)
    segments = [segment for one in generations for segment in one.trace.segments]
    rows = []
    for name, ranked in (("gradient", _by_gradient), ("policy", _by_policy)):
        for tried in (1, *TRIED, 12):
            found = [(max(ranked(segment)[:tried]), segment) for segment in segments]
            best = [max(_rewards(segment)[1:]) for segment in segments]
            base = [segment.base.reward for segment in segments]
            gained = sum(max(0.0, reward - segment.base.reward) for reward, segment in found)
            rows.append(
                {
                    "ranking": name,
                    "tried": tried,
                    "segments": len(segments),
                    "holds_best": fmean(reward == most for (reward, _), most in zip(found, best, strict=True)),
                    "share_of_gain": gained / sum(max(0.0, m - b) for m, b in zip(best, base, strict=True)),
                }
            )
    return rows


def _rewards(segment: Segment) -> list[float]:
    return [candidate.reward for candidate in segment.candidates]


def _by_policy(segment: Segment) -> list[float]:
    """Rewards of the candidates but the policy's own, the likeliest token's first."""
    return _rewards(segment)[1:]


def _by_gradient(segment: Segment) -> list[float]:
    """Rewards of the candidates but the policy's own, that of the token first which the gradient likes best."""
    liking = dict(zip(segment.base.proposals, segment.base.proposal_scores, strict=True))
    others = sorted(segment.candidates[1:], key=lambda candidate: -liking[candidate.forced_tokens[0]])
    return [candidate.reward for candidate in others]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Gold reward against tokens per second, a line for each family of methods."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    for number, family in enumerate(FAMILIES):
        points = [row for row in rows if row["method"].partition(",")[0] == family]
        if not points:
            continue
        speeds, golds = ([row[key] for row in points] for key in ("tokens_per_second", "gold"))
        below, above = ([abs(row["gold"] - row["gold_ci95"][side]) for row in points] for side in (0, 1))
        panel.errorbar(
            speeds, golds, [below, above], marker="o", markersize=5, linewidth=1, capsize=2, label=family,
            color=f"C{number}",
        )  # fmt: skip
        for row, speed, gold in zip(points, speeds, golds, strict=True):
            label = row["method"].partition(", ")[2].split(" ")[0]
            panel.annotate(label, (speed, gold), xytext=(4, 4), textcoords="offset points", fontsize=8)
    panel.set_xscale("log")
    panel.set_xlabel("tokens per second, all prompts")
    panel.set_ylabel("gold reward, mean with 95 % interval")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def print_tables(rows: Sequence[dict[str, Any]], ranked: Sequence[dict[str, Any]]) -> None:
    """Both tables."""
    print(f"{'method':32}{'gold':>24}{'guiding':>9}{'tokens/s':>10}{'policy':>8}{'reward':>8}{'backward':>10}")
    for row in rows:
        low, high = row["gold_ci95"]
        gold = f"{row['gold']:+.2f} [{low:+.2f}, {high:+.2f}]"
        print(
            f"{row['method']:32}{gold:>24}{row['reward']:>+9.2f}{row['tokens_per_second']:>10.0f}"
            f"{row['policy_tokens']:>8.0f}{row['reward_forward_tokens']:>8.0f}{row['reward_backward_tokens']:>10.0f}"
        )
    for row in ranked:
        print(
            f"{row['tried']:>3} best by {row['ranking']:9} hold the best of {CANDIDATES - 2} in "
            f"{row['holds_best']:.0%} of {row['segments']} segments, {row['share_of_gain']:.0%} of its gain"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=len(demo_models.PROMPTS))
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", nargs="+", metavar="NAME", help="names as in the table (all)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    guide, gold = (
        RewardModel.from_pretrained(path, dtype=torch.float32) for path in (demo_models.REWARD, demo_models.GOLD)
    )
    known = decoders(guide)
    if unknown := set(arguments.method or ()) - known.keys():
        parser.error(f"--method {unknown.pop()!r} is unknown; there are {', '.join(known)}")
    chosen = {name: decoder for name, decoder in known.items() if name in (arguments.method or known)}
    rows = measure(chosen, guide, gold, arguments.prompts, arguments.new_tokens, arguments.rounds)
    ranked = rankings(guide, arguments.prompts, arguments.new_tokens)
    print_tables(rows, ranked)
    if arguments.json:
        settings = {"new_tokens": arguments.new_tokens, "threads": arguments.threads, "rounds": arguments.rounds}
        write_results(arguments.json, [{**settings, "methods": rows, "rankings": ranked}])
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
