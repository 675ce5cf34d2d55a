"""GGRO against the released algorithm, and against plain `generate`, on one pair of random models.

    python benchmarks/decoding.py [--vocabulary 32000] [--threads 1 2] [--rounds 3] [--json FILE]

Policy and reward model are Llama-shaped, 512 wide, 6 layers, fp32; 128 prompt tokens, 64 new ones. The released
algorithm is its transcription in tests/ggro_hf/released.py with `released_cost`, whose stop-string table is built
once, outside the clock (the released code builds it at every pass). Rounds are interleaved, figures are medians. Peak
memory of GGRO and the released algorithm is measured in a fresh process each, as growth over the loaded models. The
methods that decode greedily are also timed on the embedded pair.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from ggro_hf import GGRO, Greedy, RewardModel, demo_models
from ggro_hf.decoding.base import Request
from ggro_hf.results import Generation

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "ggro_hf"))
from released import ReleasedGGRO, Settings

T = TypeVar("T")

PROMPT_TOKENS, NEW_TOKENS = 128, 64
REFINEMENTS, CANDIDATES = 8, 25
EOT = "<|eot_id|>"


@dataclass
class Pair:
    """The two models, a tokenizer whose text state keeps ids, a prompt, and a threshold that cuts segments."""

    policy: LlamaForCausalLM
    reward: RewardModel
    tokenizer: PreTrainedTokenizerFast
    prompt: list[int]
    threshold: float


def build_pair(vocabulary: int) -> Pair:
    """Seeded random models; the head is widened until next-token entropies are those of a real model, a few nats."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1376,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    policy = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    # Every method is to decode the same number of tokens.
    policy.generation_config.eos_token_id = None
    with torch.no_grad():
        policy.lm_head.weight.mul_(8.0)
    reward = RewardModel(LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1)))
    prompt = torch.randint(3, vocabulary, (PROMPT_TOKENS,)).tolist()
    entropies = sorted(respond(Greedy(), policy, prompt).trace.entropies)
    threshold = entropies[int(0.7 * len(entropies))]
    return Pair(policy, reward, word_tokenizer(vocabulary), prompt, threshold)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word a token: decoding and encoding again never changes ids, so the text state costs time only."""
    # `StopStringCriteria` tokenises a word of its own to find out how tokens join.
    words = {f"w{index}": index for index in range(vocabulary) if index not in (1, 2)} | {"abcdef": 1, EOT: 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOT, pad_token="w0", clean_up_tokenization_spaces=False
    )


def respond(decoder: GGRO | Greedy, policy: LlamaForCausalLM, prompt: list[int]) -> Generation:
    """One response of a decoder, without end-of-sequence."""
    return decoder.respond(Request(policy, prompt, NEW_TOKENS, frozenset()))


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
        }

    return {
        "released algorithm": run_released,
        **{name: (lambda decoder=decoder: run(decoder)) for name, decoder in decoders_.items()},
        "transformers generate, greedy": run_generate,
    }


def build_embedded_pair() -> Pair:
    """The embedded models, where Python and not arithmetic takes most of a step."""
    policy = LlamaForCausalLM.from_pretrained(demo_models.POLICY, dtype=torch.float32)
    policy.generation_config.eos_token_id = None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_models.POLICY)
    reward = RewardModel.from_pretrained(demo_models.REWARD, dtype=torch.float32)
    return Pair(policy, reward, tokenizer, tokenizer(demo_models.PROMPTS[0])["input_ids"], 3.0)


def measure_without_nudges(pair: Pair, rounds: int) -> dict[str, float]:
    """Tokens per second of the methods that decode greedily."""
    runs: dict[str, Callable[[], list[int]]] = {
        "GGRO, never intervening": lambda: respond(never_intervening(pair), pair.policy, pair.prompt).token_ids,
        "Greedy": lambda: respond(Greedy(), pair.policy, pair.prompt).token_ids,
        "transformers generate, greedy": lambda: generate_greedily(pair)[len(pair.prompt) :],
    }
    assert len({tuple(run()) for run in runs.values()}) == 1
    return {name: NEW_TOKENS / seconds for name, (_, seconds) in interleaved(runs, rounds).items()}


def interleaved(runs: dict[str, Callable[[], T]], rounds: int) -> dict[str, tuple[T, float]]:
    """The last result of every function and its median seconds, the functions taking turns."""
    results: dict[str, T] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = perf_counter()
            results[name] = run()
            seconds[name].append(perf_counter() - start)
    return {name: (results[name], statistics.median(times)) for name, times in seconds.items()}


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


def peak_growth(vocabulary: int, name: str) -> int:
    """Peak memory of one method over the loaded models, bytes, in a process of its own."""
    command = [sys.executable, __file__, "--vocabulary", str(vocabulary), "--peak-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(vocabulary: int, name: str) -> None:
    """The child process of `peak_growth`."""
    run = methods(build_pair(vocabulary))[name]
    # Building the models had a peak of its own: start counting afresh (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_kib("VmRSS")
    run()
    print(1024 * (memory_kib("VmHWM") - before))


def memory_kib(field: str) -> int:
    """A field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print_peak(arguments.vocabulary[0], arguments.peak_of)
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
        peaks = {name: peak_growth(vocabulary, name) for name in ("released algorithm", "GGRO, as released")}
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            results = measure(pair, arguments.rounds)
            for name, peak in peaks.items():
                results[name]["peak_bytes"] = peak
            print_table(f"vocabulary {vocabulary}, {threads} thread(s)", results)
            report["runs"].append({"vocabulary": vocabulary, "threads": threads, "methods": results})
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
