"""SP-PRM on film reviews: does a process reward model agree with itself sooner, and does it guide better?

    python -m benchmarks.sp_prm --data DIR --work DIR [--seeds 0 1 2] [--processes 2] [--json FILE]

DIR/train.jsonl.gz and DIR/val.jsonl.gz hold reviews, `{"text", "label", "stars"}` a line. A preference pair is two
reviews that begin with the same two words, the prompt, of which one has 7 stars or more and the other 4 or fewer: what
a decoder compares, with people's ratings as the preference. Reviews have at most 256 tokens. The pairs to train on come
from the half of the training reviews that the gold model has not seen the labels of, those to measure on from the
validation reviews.

For every seed: an outcome reward model, trained from the demo's policy on finished reviews alone; from it process
reward models by SP-PRM without a reference model (the ablation), with itself as the reference, and with the demo's
reward model, which has seen the labels at every length, as the reference. Then agreement by length on the held-out
pairs, with the gold model as the judge of partial reviews, and ARGS and chunk-level beam search guided by each, judged
by the gold model.
Everything is resumable: a repeated command does what is left.
"""

import argparse
import gzip
import json
import multiprocessing
import random
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from ggro_hf import ARGS, ChunkBeamSearch, Decoder, Greedy, RewardModel, demo_models
from ggro_hf.evaluation import compare, mean_interval
from ggro_hf.training import sp_prm
from ggro_hf.training.demo.data import clean_text
from ggro_hf.training.demo.reward import reward_from_policy
from ggro_hf.training.recipe import recipe_from

LONGEST = 256
OPENING_WORDS = 2
# A review is compared with at most so many of the other kind.
MOST_OPPONENTS = 4
HELD_OUT = 1000
LENGTHS = [2, 5, 10, 15, 20, 25, 30, 40, 50, 75, 100]
NEW_TOKENS = 48

VARIANTS: dict[str, dict[str, Any]] = {
    "no reference": {"mode": "none"},
    "reference: itself": {"mode": "reference", "reference": "ORM"},
    "reference: demo": {"mode": "reference", "reference": str(demo_models.REWARD)},
}
OUTCOME = "outcome"


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="models and what is left undone by a kill")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time, one thread each")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train, held_out = args.work / "train.jsonl", args.work / "held_out.jsonl"
    write_pairs(args.data / "train.jsonl.gz", train, half=True)
    write_pairs(args.data / "val.jsonl.gz", held_out, half=False)
    # A process of its own for each, as fork and threads do not go together.
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run_seed, [args.work] * len(args.seeds), args.seeds))
    figures = {"seeds": args.seeds, "runs": results}
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(_rounded(figures), indent=1) + "\n", encoding="utf-8")


def write_pairs(source: Path, path: Path, half: bool) -> None:
    """Preference pairs of the reviews, of their first half or of all, in a drawn order that is always the same."""
    if path.is_file():
        return
    tokenizer = AutoTokenizer.from_pretrained(demo_models.REWARD)
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        reviews = [json.loads(line) for line in lines]
    by_opening: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for review in reviews[: len(reviews) // 2] if half else reviews:
        text = clean_text(review["text"])
        opening = " ".join(text.split()[:OPENING_WORDS])
        # A line break between the words would not be in the prompt.
        if text.startswith(opening) and len(tokenizer.backend_tokenizer.encode(text).ids) <= LONGEST:
            by_opening[opening][review["stars"] > 5].append(text[len(opening) :])
    draws = random.Random(0)
    pairs = []
    for opening, (negative, positive) in by_opening.items():
        many, few = (positive, negative) if len(positive) >= len(negative) else (negative, positive)
        for one in many:
            for other in draws.sample(few, min(MOST_OPPONENTS if half else 1, len(few))):
                chosen, rejected = (one, other) if many is positive else (other, one)
                pairs.append({"prompt": opening, "chosen": chosen, "rejected": rejected})
    draws.shuffle(pairs)
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def run_seed(work: Path, seed: int) -> dict[str, Any]:
    """Agreement curves and gold rewards of all models of a seed."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    directory = work / f"seed-{seed}"
    start = directory / "start"
    if not start.is_dir():
        policy = LlamaForCausalLM.from_pretrained(demo_models.POLICY, dtype=torch.float32)
        reward_from_policy(policy, layers=3).save_pretrained(start)
        AutoTokenizer.from_pretrained(demo_models.REWARD).save_pretrained(start)
    outcome = _train(work, directory / OUTCOME, start, seed, {"method": "finished"}, {"mode": "none"}, 3e-4, epochs=2)
    models = {OUTCOME: outcome}
    for name, weights in VARIANTS.items():
        own = {**weights, "reference": str(outcome)} if weights.get("reference") == "ORM" else weights
        models[name] = _train(work, directory / _slug(name), outcome, seed, {"method": "sst"}, own, 1e-4, epochs=1)
    return {
        "seed": seed,
        "agreement": _agreement(work, directory, models, seed),
        "guided": _guided(directory / "guided.json", models),
    }


def _recipe(work: Path, output: Path, model: Path, seed: int, **tables: Mapping[str, Any]) -> Any:
    return recipe_from(
        {
            "output": str(output),
            "seed": seed,
            "model": {"name": str(model)},
            "data": {"source": str(work / "train.jsonl"), "held_out": str(work / "held_out.jsonl")},
            "agreement": {"lengths": LENGTHS, "pairs": HELD_OUT},
            **tables,
        }
    )


def _train(
    work: Path,
    output: Path,
    model: Path,
    seed: int,
    partial: Mapping[str, Any],
    weights: Mapping[str, Any],
    learning_rate: float,
    epochs: int,
) -> Path:
    arguments = {
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 16,
        "warmup_steps": 20,
        "bf16": True,
        "use_cpu": True,
        "eval_strategy": "no",
        "eval_on_start": False,
        "disable_tqdm": True,
    }
    recipe = _recipe(work, output, model, seed, partial=partial, weights=weights, train={"arguments": arguments})
    sp_prm.make_data(recipe)
    sp_prm.make_weights(recipe, "cpu")
    sp_prm.train(recipe)
    return output / "model"


def _agreement(work: Path, directory: Path, models: Mapping[str, Path], seed: int) -> list[dict[str, Any]]:
    """Agreement by length of all models."""
    names = list(models)
    last = directory / _slug(names[1])
    written = last / "agreement" / "agreement.json"
    if not written.is_file():
        recipe = _recipe(
            work,
            last,
            models[OUTCOME],
            seed,
            partial={"method": "sst"},
            weights=VARIANTS[names[1]],
            agreement={
                "lengths": LENGTHS,
                "pairs": HELD_OUT,
                "judge": str(demo_models.GOLD),
                "compare": {name: str(models[name]) for name in names[2:]},
            },
        )
        sp_prm.measure_agreement(recipe, "cpu")
    labels = {"before": OUTCOME, "after": names[1]}
    records = json.loads(written.read_text(encoding="utf-8"))
    return [{**record, "model": labels.get(record["model"], record["model"])} for record in records]


def _guided(path: Path, models: Mapping[str, Path]) -> dict[str, dict[str, list[float]]]:
    """Gold rewards of every decoder with every model, a list over prompts."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    policy = LlamaForCausalLM.from_pretrained(demo_models.POLICY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_models.POLICY)
    gold = RewardModel.from_pretrained(demo_models.GOLD, dtype=torch.float32)
    for name, model in models.items():
        if name in found:
            continue
        guide = RewardModel.from_pretrained(model, dtype=torch.float32)
        decoders: dict[str, Decoder] = {
            "greedy": Greedy(),
            "ARGS": ARGS(guide, candidates=9),
            "CBS": ChunkBeamSearch(guide, width=2, successors=3, chunk_length=8, seed=0),
        }
        runs = compare(
            policy,
            tokenizer,
            list(demo_models.PROMPTS),
            decoders,
            guide=guide,
            gold=gold,
            max_new_tokens=NEW_TOKENS,
            progress=False,
        )
        found[name] = {run.method: run.gold_rewards for run in runs}
        path.write_text(json.dumps(found), encoding="utf-8")
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Agreement with the finished reviews by length, and gold rewards, means over the seeds."""
    lengths = [*LENGTHS, None]
    names = [OUTCOME, *VARIANTS]
    lines = ["AR_RM-SC in percent, mean over seeds (lowest to highest)"]
    lines.append(f"{'':20}" + "".join(f"{'finished' if length is None else length:>20}" for length in lengths))
    for name in names:
        cells = []
        for length in lengths:
            values = [
                100 * row["rm_sc_mean"]
                for result in results
                for row in result["agreement"]
                if row["model"] == name and row["length"] == length
            ]
            cells.append(f"{fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append(f"{name:20}" + "".join(f"{cell:>20}" for cell in cells))
    lines.append("\ngold reward, mean over seeds and prompts, and its gain over the outcome model on the same prompts")
    for decoder in ("greedy", "ARGS", "CBS"):
        for name in names:
            rewards = [value for result in results for value in result["guided"][name][decoder]]
            base = [value for result in results for value in result["guided"][OUTCOME][decoder]]
            gain = mean_interval([value - other for value, other in zip(rewards, base, strict=True)])
            assert gain is not None
            interval = "" if name == OUTCOME else f"  {gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
            lines.append(f"{decoder:8} {name:20} {fmean(rewards):+.2f}{interval}")
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    """JSON values with four digits behind the point."""
    if isinstance(value, dict):
        return {key: _rounded(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_rounded(own) for own in value]
    return round(value, 4) if isinstance(value, float) else value


def _slug(name: str) -> str:
    return name.replace(": ", "-").replace(" ", "-")


if __name__ == "__main__":
    main()
