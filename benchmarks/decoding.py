"""GGRO against the released algorithm, and against plain `generate`, on one pair of random models.

    python -m benchmarks.decoding [--vocabulary 32000] [--threads 1 2] [--rounds 3] [--json FILE]

Policy and reward model are Llama-shaped, 512 wide, 6 layers, fp32; 128 prompt tokens, 64 new ones. The released
algorithm is its transcription in tests/ggro_hf/released.py with `released_cost`, whose stop-string table is built
once, outside the clock (the released code builds it at every pass). Rounds are interleaved, figures are medians. Then
16 prompts of different lengths, one by one and at once; the released algorithm takes one prompt at a time, so its
figure is that of the single prompt. Peak memory is measured in a fresh process each, as growth over the loaded models.
The methods that decode greedily are also timed on the embedded pair.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from benchmarks.memory import last_number_printed_by, peak_growth
from benchmarks.pairs import NEW_TOKENS, PROMPT_TOKENS, Pair, build_embedded_pair, build_pair, respond
from benchmarks.rounds import interleaved
from ggro_hf import GGRO, Greedy
from ggro_hf.decoding.base import MAX_BATCH_TOKENS, Request
from ggro_hf.results import Generation
from tests.ggro_hf.released import ReleasedGGRO, Settings

REFINEMENTS, CANDIDATES = 8, 25
MANY_PROMPTS = 16


def methods(pair: Pair) -> dict[str, Callable[[], dict[str, object]]]:
    """Each method as a function that runs once and says what it did."""
    released = ReleasedGGRO(
        pair.policy,
        pair.reward.model,
        pair.tokenizer,
        Settings(
            NEW_TOKENS,
            pair.threshold,
            REFINEMENTS,
            CANDIDATES,
            frozenset(),
            frozenset([2]),
            forcing="id",
            released_cost=True,
        ),
    )
    settings = {"entropy_threshold": pair.threshold, "refinements": REFINEMENTS, "candidates": CANDIDATES}
    decoders_ = {
        "GGRO, as released": GGRO(pair.reward, tokenizer=pair.tokenizer, as_released=True, **settings),
        "GGRO": GGRO(pair.reward, **settings),
        "GGRO, no speculation": GGRO(pair.reward, speculate=1, **settings),
        "GGRO, never intervening": never_intervening(pair),
        "Greedy": Greedy(),
    }

    def run_released() -> dict[str, object]:
        result = released(pair.prompt)
        return {
            "tokens": result.generated_ids[PROMPT_TOKENS:],
            "segments": len(result.segments),
            "candidates": sum(len(segment.candidates) for segment in result.segments),
            "policy_tokens": result.policy_tokens,
            "reward_forward_tokens": result.reward_forward_tokens,
            "reward_backward_tokens": result.reward_backward_tokens,
        }

    def run_generate() -> dict[str, object]:
        tokens = generate_greedily(pair)[PROMPT_TOKENS:]
        return {"tokens": tokens, "policy_tokens": PROMPT_TOKENS + NEW_TOKENS - 1}

    def run(decoder: GGRO | Greedy) -> dict[str, object]:
        generation = respond(decoder, pair.policy, pair.prompt)
        return {
            "tokens": generation.token_ids,
            "segments": len(generation.trace.segments),
            "candidates": sum(len(segment.candidates) for segment in generation.trace.segments),
            "policy_tokens": generation.counters.policy_tokens,
            "reward_forward_tokens": generation.counters.reward_forward_tokens,
            "reward_backward_tokens": generation.counters.reward_backward_tokens,
            "seconds": generation.counters.seconds,
            "speculation_hits": generation.counters.speculation_hits,
            "speculation_misses": generation.counters.speculation_misses,
            "wasted_policy_tokens": generation.counters.wasted_policy_tokens,
            "wasted_reward_tokens": generation.counters.wasted_reward_tokens,
        }

    return {
        "released algorithm": run_released,
        **{name: (lambda decoder=decoder: run(decoder)) for name, decoder in decoders_.items()},
        "transformers generate, greedy": run_generate,
    }


def many_prompts(pair: Pair) -> dict[str, Callable[[], list[Generation]]]:
    """GGRO on many prompts, one by one and at once."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = pair.policy.config.vocab_size
    prompts = [
        torch.randint(3, vocabulary, (PROMPT_TOKENS - MANY_PROMPTS + 2 * number,), generator=generator).tolist()
        for number in range(MANY_PROMPTS)
    ]
    decoder = GGRO(pair.reward, entropy_threshold=pair.threshold, refinements=REFINEMENTS, candidates=CANDIDATES)
    requests = [Request(pair.policy, ids, NEW_TOKENS, frozenset(), row) for row, ids in enumerate(prompts)]
    return {
        f"{MANY_PROMPTS} prompts, one by one": lambda: [decoder.respond(request) for request in requests],
        f"{MANY_PROMPTS} prompts at once": lambda: list(decoder.respond_all(requests, MAX_BATCH_TOKENS)),
    }


def measure_many_prompts(pair: Pair, rounds: int) -> dict[str, dict[str, object]]:
    """One row for either way, after one warm-up."""
    runs = many_prompts(pair)
    for run in runs.values():
        run()
    measured = interleaved(runs, rounds)
    (alone, _), _ = measured.values()
    rows = {}
    for name, (generations, seconds) in measured.items():
        counters = [generation.counters for generation in generations]
        phases = {phase for one in counters for phase in one.seconds}
        rows[name] = {
            "policy_tokens": sum(one.policy_tokens for one in counters),
            "reward_forward_tokens": sum(one.reward_forward_tokens for one in counters),
            "reward_backward_tokens": sum(one.reward_backward_tokens for one in counters),
            "seconds": {phase: sum(one.seconds.get(phase, 0.0) for one in counters) for phase in sorted(phases)},
            "tokens_per_second": MANY_PROMPTS * NEW_TOKENS / seconds,
            "same_as_one_by_one": [one.token_ids for one in generations] == [one.token_ids for one in alone],
            "rewards_differ_by": max(abs(a.reward - b.reward) for a, b in zip(generations, alone, strict=True)),
        }
    return rows


def measure_without_nudges(pair: Pair, rounds: int) -> dict[str, float]:
    """Tokens per second of the methods that decode greedily."""
    runs: dict[str, Callable[[], list[int]]] = {
        "GGRO, never intervening": lambda: respond(never_intervening(pair), pair.policy, pair.prompt).token_ids,
        "Greedy": lambda: respond(Greedy(), pair.policy, pair.prompt).token_ids,
        "transformers generate, greedy": lambda: generate_greedily(pair)[len(pair.prompt) :],
    }
    assert len({tuple(run()) for run in runs.values()}) == 1
    return {name: NEW_TOKENS / seconds for name, (_, seconds) in interleaved(runs, rounds).items()}


def never_intervening(pair: Pair) -> GGRO:
    """One pass, one segment: GGRO's own way of being greedy."""
    return GGRO(pair.reward, entropy_threshold=float("inf"), refinements=1)


def generate_greedily(pair: Pair) -> list[int]:
    """Prompt and response of transformers' own greedy search."""
    ids = torch.tensor([pair.prompt])
    output = pair.policy.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return output[0].tolist()


def measure(pair: Pair, rounds: int) -> dict[str, dict[str, object]]:
    """One row a method, after one warm-up of all but the slow released algorithm."""
    runs = methods(pair)
    for name, run in runs.items():
        if name != "released algorithm":
            run()
    measured = interleaved(runs, rounds)
    expected = measured["released algorithm"][0]["tokens"]
    rows = {}
    for name, (result, seconds) in measured.items():
        same = result.pop("tokens") == expected
        rows[name] = {**result, "tokens_per_second": NEW_TOKENS / seconds, "same_as_released": same}
    return rows


def print_table(title: str, results: dict[str, dict[str, object]]) -> None:
    """One line a method, ratios against the released algorithm."""
    baseline = results["released algorithm"]["tokens_per_second"]
    print(f"\n{title}")
    print(
        f"{'method':32}{'tokens/s':>10}{'ratio':>8}{'policy':>9}{'reward':>9}{'backward':>10}{'segments':>10}{'candidates':>12}"
        f"{'peak MB':>9}{'same tokens':>13}"
    )
    for name, row in results.items():
        speed = row["tokens_per_second"]
        peak = f"{row['peak_bytes'] / 1e6:9.0f}" if "peak_bytes" in row else ""
        cells = (row.get(key, "") for key in ("policy_tokens", "reward_forward_tokens", "reward_backward_tokens"))
        policy, forward, backward = cells
        print(
            f"{name:32}{speed:10.2f}{speed / baseline:8.1f}{policy:>9}{forward:>9}{backward:>10}"
            f"{row.get('segments', ''):>10}{row.get('candidates', ''):>12}{peak:>9}"
            f"{'yes' if row['same_as_released'] else 'no':>13}"
        )
    for name, row in results.items():
        if "seconds" in row:
            phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["seconds"].items())
            print(f"  {name}: {phases} s (last round)")


def print_many(results: dict[str, dict[str, object]], released: float) -> None:
    """One line a way, ratios against the released algorithm and the first way."""
    alone = next(iter(results.values()))["tokens_per_second"]
    for name, row in results.items():
        speed = row["tokens_per_second"]
        peak = f", peak {row['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in row else ""
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["seconds"].items())
        print(f"{name}: {speed:.2f} tokens/s, {speed / released:.1f}x released, {speed / alone:.2f}x one by one{peak}")
        print(f"  same tokens: {row['same_as_one_by_one']}, rewards within {row['rewards_differ_by']:.1g}; {phases} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        pair = build_pair(arguments.vocabulary[0])
        print(peak_growth((methods(pair) | many_prompts(pair))[arguments.peak_of]))
        return
    report: dict[str, object] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
        "runs": [],
    }
    embedded = build_embedded_pair()
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        speeds = measure_without_nudges(embedded, rounds=11)
        print(
            f"embedded pair, {threads} thread(s): "
            + ", ".join(f"{name} {x:.0f} tokens/s" for name, x in speeds.items())
        )
        report["runs"].append({"vocabulary": "embedded", "threads": threads, "tokens_per_second": speeds})
    for vocabulary in arguments.vocabulary:
        pair = build_pair(vocabulary)
        peaks = {
            name: last_number_printed_by("benchmarks.decoding", "--vocabulary", str(vocabulary), "--peak-of", name)
            for name in ("released algorithm", "GGRO, as released", "GGRO", f"{MANY_PROMPTS} prompts at once")
        }
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            results = measure(pair, arguments.rounds)
            many = measure_many_prompts(pair, arguments.rounds)
            for name, peak in peaks.items():
                (results | many)[name]["peak_bytes"] = peak
            print_table(f"vocabulary {vocabulary}, {threads} thread(s)", results)
            print_many(many, results["released algorithm"]["tokens_per_second"])
            report["runs"].append(
                {"vocabulary": vocabulary, "threads": threads, "methods": results, "many_prompts": many}
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
