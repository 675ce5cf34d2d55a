"""`ggro demo`: all methods side by side on the embedded models, those that ask the reward at about the same cost."""

import argparse
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ggro_hf import demo_models
from ggro_hf.cli.errors import CommandError, check_writable, one_line
from ggro_hf.cli.models import load_policy, load_reward_model
from ggro_hf.cli.session import positive
from ggro_hf.decoding import (
    ARGS,
    CARDS,
    GGRO,
    BestOfN,
    ChunkBeamSearch,
    Decoder,
    Greedy,
    RejectionSampling,
    Sample,
)
from ggro_hf.evaluation import MethodRun, compare, generation_record, summarize
from ggro_hf.report import ReportPrompt, ReportResponse, write_report
from ggro_hf.rewards import RewardModel
from ggro_kernels import __version__

# An interval over fewer prompts says too little.
_FEWEST_PROMPTS = 32
_ENTROPY_THRESHOLD = 3.0
_REFINEMENTS = 8
_CANDIDATES = 25
# In the reward model's units: better than nine of ten samples.
_REWARD_THRESHOLD = 4.0


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="compare the methods on the embedded models",
        description="Compare all methods on small embedded models of film reviews, guided ones at equal cost.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--prompts", type=int, default=_FEWEST_PROMPTS, metavar="N", help="how many openings to continue (32)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=48, metavar="N", help="length of a response (48)")
    parser.add_argument("--seed", type=int, default=0, help="of the methods that draw (0)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--report", metavar="FILE", default="report.html", help="the page to write (report.html)")


def run(args: argparse.Namespace) -> int:
    """Decode, print the table, write the page and the figures."""
    check_writable("--report", args.report)
    check_writable("--json", args.json)
    available = len(demo_models.PROMPTS)
    if not _FEWEST_PROMPTS <= args.prompts <= available:
        raise CommandError(f"--prompts is {args.prompts}, but must be from {_FEWEST_PROMPTS} to {available}")
    prompts = list(demo_models.PROMPTS[: args.prompts])
    # Stored as fp16 to be small, computed in fp32.
    policy = load_policy(str(demo_models.POLICY), torch.float32, "cpu")
    guide = load_reward_model(str(demo_models.REWARD), torch.float32, "cpu")
    gold = load_reward_model(str(demo_models.GOLD), torch.float32, "cpu")
    runs = compare(
        policy.model,
        policy.tokenizer,
        prompts,
        _decoders(guide, args.seed),
        guide=guide,
        gold=gold,
        max_new_tokens=args.max_new_tokens,
    )
    rows = [summarize(method, baseline=runs[0]) for method in runs]
    print(f"\n{_settings_line(args)}\n\n{_table(rows)}\n\n{_differences(rows)}")
    try:
        _write_page(args, policy.tokenizer, prompts, runs, rows)
        print(f"\n{args.report} shows every token, segment and candidate")
        if args.json:
            figures = {
                "prompts": args.prompts,
                "max_new_tokens": args.max_new_tokens,
                "seed": args.seed,
                "versions": _versions(),
                "methods": rows,
            }
            Path(args.json).write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(one_line(error)) from error
    return 0


def _decoders(guide: RewardModel, seed: int) -> dict[str, Decoder]:
    """Methods that ask the reward process about 500 tokens a response at 48 new tokens, as GGRO does."""
    accepts: dict[str, Any] = {"reward_threshold": _REWARD_THRESHOLD, "seed": seed}
    return {
        "greedy": Greedy(),
        "sample": Sample(seed=seed),
        "best-of-5": BestOfN(guide, samples=5, seed=seed),
        "rejection": RejectionSampling(guide, attempts=4, **accepts),
        "cards": CARDS(guide, attempts=8, **accepts),
        "cbs": ChunkBeamSearch(guide, width=2, successors=3, chunk_length=8, seed=seed),
        "tbs": ChunkBeamSearch(guide, width=2, successors=5, chunk_length=1, seed=seed),
        "args": ARGS(guide, candidates=9),
        "ggro": GGRO(
            guide,
            entropy_threshold=_ENTROPY_THRESHOLD,
            refinements=_REFINEMENTS,
            candidates=_CANDIDATES,
            # The methods are compared at the same work, so none may do more to be quick.
            speculate=1,
        ),
    }


def _settings_line(args: argparse.Namespace) -> str:
    return (
        f"{args.prompts} prompts, {args.max_new_tokens} new tokens, seed {args.seed}, fp32, "
        f"{torch.get_num_threads()} threads\n"
        "rejection, cards: reward threshold 4; cbs: 2 beams, 3 chunks of 8 tokens each; tbs: 2 beams, 5 tokens each; "
        "args: 9 candidates\n"
        f"ggro: threshold {_ENTROPY_THRESHOLD} nats, {_REFINEMENTS} passes a segment, {_CANDIDATES} candidates\n"
        "means with 95 % intervals; policy, reward, backward: tokens processed per response, all: their sum"
    )


def _versions() -> dict[str, str]:
    return {
        "ggro": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = {
        "method": [row["method"] for row in rows],
        "guiding reward": [_with_interval(row, "reward") for row in rows],
        "gold reward": [_with_interval(row, "gold") for row in rows],
        "diversity": [_with_interval(row, "diversity", signed=False) for row in rows],
        "tokens/s": [f"{row['tokens_per_second']:.0f}" for row in rows],
        "policy": [f"{row['policy_tokens']:.0f}" for row in rows],
        "reward": [f"{row['reward_forward_tokens']:.0f}" for row in rows],
        "backward": [f"{row['reward_backward_tokens']:.0f}" for row in rows],
        "all": [f"{_work(row):.0f}" for row in rows],
    }
    widths = [max(map(len, (name, *cells))) for name, cells in columns.items()]
    lines = [columns.keys(), ["-" * width for width in widths], *zip(*columns.values(), strict=True)]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(cells: Any, widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)])


def _with_interval(row: dict[str, Any], name: str, *, signed: bool = True) -> str:
    if row[f"{name}_mean" if signed else name] is None:
        return "-"
    mean, (low, high) = row[f"{name}_mean" if signed else name], row[f"{name}_ci95"]
    sign = "+" if signed else ""
    return f"{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _work(row: dict[str, Any]) -> float:
    return row["policy_tokens"] + row["reward_forward_tokens"] + row["reward_backward_tokens"]


def _differences(rows: Sequence[dict[str, Any]]) -> str:
    """The paired differences from the first method, a line each."""
    return "\n".join(
        f"{row['method']} minus {rows[0]['method']} on the same prompts: "
        f"guiding {_with_interval(row, 'reward_gain')}, gold {_with_interval(row, 'gold_gain')}"
        for row in rows[1:]
    )


def _write_page(
    args: argparse.Namespace,
    tokenizer: Any,
    prompts: Sequence[str],
    runs: Sequence[MethodRun],
    rows: Sequence[dict[str, Any]],
) -> None:
    responses = [
        [
            ReportResponse(method.method, generation_record(generation), reward, gold)
            for generation, reward, gold in zip(method.generations, method.rewards, method.gold_rewards, strict=True)
        ]
        for method in runs
    ]
    *others, shown = responses
    write_report(
        args.report,
        title="GGRO on film reviews",
        settings={
            "prompts": args.prompts,
            "new tokens": args.max_new_tokens,
            "seed": args.seed,
            "entropy threshold": f"{_ENTROPY_THRESHOLD} nats",
            "passes per segment": _REFINEMENTS,
            "candidates": _CANDIDATES,
            **_versions(),
        },
        tokenizer=tokenizer,
        prompts=[
            ReportPrompt(prompt, shown[index], [method[index] for method in others])
            for index, prompt in enumerate(prompts)
        ],
        methods=rows,
        entropy_threshold=_ENTROPY_THRESHOLD,
    )
