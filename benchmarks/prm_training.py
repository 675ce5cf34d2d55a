"""A training step of SP-PRM against a pass for every partial response, which is what plain transformers does.

    python -m benchmarks.prm_training [--case sst ...] [--model 512 embedded] [--threads 1 2] [--rounds 3]
                                      [--memory] [--json FILE]

A step is forward, loss and backward over all pairs of a case, without the optimizer; "scoring" is the forward alone.
Ours is what the trainer does: pairs are tokenised and collated within the time, a response is computed once, the loss
is `weighted_bt_loss`. The baselines (benchmarks/baselines/partial_rows.py) compute every partial response as a row of a
padded batch, four comparisons a batch as in the released code, with gradient accumulation; their token ids are ready
before the clock starts. One takes the comparisons in a drawn order, as the released code does, the other, kinder, by
length, so that little is padded. The causal model is Llama-shaped and the encoder BERT-shaped, 512 wide, 6 layers,
fp32, random; "embedded" is the demo's reward model. Prompts have 64 tokens.

    sst      4 pairs, responses of 160 to 240 tokens, K=5: 1, 4, 7 and 10 drawn lengths, in the mean those of U(1, 10),
             and the finished responses
    sst-closed  the same, every partial response closed by end-of-sequence: branches under a mask
    tlt      1 pair, responses of 100 tokens, compared at every length from 1 to 100
    scoring  4 pairs, responses of 200 tokens, rewards at 10 lengths, 20 to 200, for AR(t); no gradient
    encoder  the same by an encoder, where there is nothing to share
    encoder-sst  2 pairs as in sst, 3 and 8 drawn lengths, by that encoder

What is to be expected, from tokens alone, prompt P, responses of T tokens:

    sst      5.5 partial responses of (P + T/2) and the finished one of (P + T) against one pass of (P + T):
             5.5 * 164/264 + 1 = 4.4; in a drawn order the batch is padded to the longest of eight rows, about
             6.5 * 230/264 = 5.7
    tlt      100 * (P + T/2) / (P + T) = 70; 88 in a drawn order
    scoring  10 * (64 + 110) / 264 = 6.6; 8 in a drawn order
    encoder  1; encoder-sst up to a fifth below it, as a pair's partial responses are padded to the longest of them

The time follows but for three things. Attention costs a token more in a longer row, and ours has the longest rows
only: a few percent of 6.3 MFLOP a token and layer at these lengths. Gradient accumulation adds to every gradient once a
batch, that of the embedding (dense, vocabulary times width) included, which costs the baselines up to a few percent.
And ours pads responses of different lengths to the longest of four pairs.

Losses, gradients and rewards must be those of the baseline in fp32 rounding: see `LOSS_BOUND` and `GRADIENT_BOUND`.
Rounds are interleaved, figures are medians. Tokens are those that enter the embedding, padding included, counted by a
hook in a run of its own, the first; "unpadded" are those of the inputs. Peak memory (`--memory`) is the growth over the
loaded model, gradients included, on one thread.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from benchmarks.baselines import partial_rows
from benchmarks.memory import last_number_printed_by, peak_growth
from benchmarks.pairs import llama_config, word_tokenizer
from benchmarks.rounds import interleaved, write_results
from ggro_hf import demo_models
from ggro_hf.pairs import PartialPair, PreferencePair
from ggro_hf.prompts import Prompt
from ggro_hf.rewards import Format
from ggro_hf.training.partial import PartialRecipe
from ggro_hf.training.prefix_reader import PrefixReader
from ggro_hf.training.prefix_trainer import PairCollator, PrefixTrainer, WeighedInputs
from ggro_hf.training.scoring import PrefixScorer
from ggro_hf.training.units import Tokens
from ggro_hf.training.weights import WeighedPair

LOSS_BOUND = 1e-5
"""On the difference of two losses, relative; for scoring of two rewards, relative to the largest."""
GRADIENT_BOUND = 1e-4
"""On the largest difference of two gradients, relative to the largest gradient. The causal models stay near 1e-6; a
random encoder gives nearly the same reward to everything, and what cancels leaves either way 1e-5 off its gradient in
fp64."""

PROMPT_TOKENS = 64
OURS = "ours"
CASES = ("sst", "sst-closed", "tlt", "scoring", "encoder", "encoder-sst")
MODELS = ("512", "embedded")
TARGETS = {"sst": 4.0, "sst-closed": 4.0, "tlt": 20.0, "encoder": 0.95}
"""Of the ratio of seconds; an encoder's scores gain nothing and may lose no more than the noise."""


@dataclass(frozen=True)
class Subject:
    """A reward model, its tokenizer and the words that responses are made of."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    words: Sequence[str]

    @property
    def causal(self) -> bool:
        """Whether it can be read at every position."""
        return hasattr(self.model, "score")

    def text(self, tokens: int, draws: random.Random) -> str:
        """Drawn words of so many tokens, or about so many where tokens are not words."""
        text = " ".join(draws.choices(self.words, k=tokens))
        return Tokens(self.tokenizer).prefix(text, tokens)


def build(model: str, *, causal: bool = True) -> Subject:
    """The subject of that name, seeded."""
    torch.manual_seed(0)
    if model == "embedded" and causal:
        reward = LlamaForSequenceClassification.from_pretrained(demo_models.REWARD, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_models.REWARD)
        return Subject(_for_training(reward), tokenizer, " ".join(demo_models.PROMPTS).split())
    vocabulary = 32_000
    words = [f"w{index}" for index in range(3, vocabulary)]
    if causal:
        reward = LlamaForSequenceClassification(llama_config(vocabulary, num_labels=1))
    else:
        config = BertConfig(
            hidden_size=512,
            num_hidden_layers=6,
            num_attention_heads=8,
            intermediate_size=2048,
            vocab_size=vocabulary,
            num_labels=1,
            pad_token_id=0,
            # Otherwise every pass has a gradient of its own.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        reward = BertForSequenceClassification(config)
    return Subject(_for_training(reward), word_tokenizer(vocabulary), words)


def _for_training(model: PreTrainedModel) -> PreTrainedModel:
    # Training has no use for a cache, neither has the baseline.
    model.config.use_cache = False
    return model.train()


def pairs_of(case: str, subject: Subject) -> list[WeighedPair]:
    """The comparisons of a case, always the same, with weights of 1.44 to 10."""
    draws = random.Random(0)
    if case == "tlt":
        partials = [_partial(subject, draws, 1, 100, tuple(range(1, 101)))]
    elif case in ("scoring", "encoder"):
        partials = [_partial(subject, draws, row, 200, tuple(range(20, 201, 20))) for row in range(1, 5)]
    else:
        partials = _sampled(subject, draws, counts=(3, 8) if case.startswith("encoder") else (1, 4, 7, 10))
    return [
        WeighedPair(item, tuple(draws.uniform(1.4427, 10) for _ in item.lengths))
        for item in draws.sample(partials, len(partials))
    ]


def _sampled(subject: Subject, draws: random.Random, counts: Sequence[int]) -> list[PartialPair]:
    """For each of the counts the first pair that draws so many lengths."""
    recipe, unit = PartialRecipe(method="sst", segments=5), Tokens(subject.tokenizer)
    found: dict[int, PartialPair] = {}
    row = 0
    while len(found) < len(counts):
        row += 1
        chosen, rejected = draws.randint(160, 240), draws.randint(160, 240)
        item = _partial(subject, draws, row, (chosen, rejected), ())
        longest = max(unit.count(item.pair.chosen), unit.count(item.pair.rejected))
        lengths = recipe.lengths(item.pair, longest)
        if len(lengths) - 1 in counts:
            found.setdefault(len(lengths) - 1, PartialPair(item.pair, lengths))
    return list(found.values())


def _partial(
    subject: Subject,
    draws: random.Random,
    row: int,
    tokens: int | tuple[int, int],
    lengths: tuple[int | None, ...],
) -> PartialPair:
    chosen, rejected = (tokens, tokens) if isinstance(tokens, int) else tokens
    texts = (subject.text(count, draws) for count in (PROMPT_TOKENS, chosen, rejected))
    return PartialPair(PreferencePair(row, *texts), lengths)


@dataclass(frozen=True)
class Way:
    """`run` gives the loss and leaves its gradient in the model, or gives rewards, over so many tokens of input."""

    run: Callable[[], Any]
    unpadded: int


class _Closed(Format):
    """Every partial response closed by end-of-sequence."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, responses: Sequence[str]) -> BatchEncoding:
        rows = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
        before = tokenizer(str(prompt))["input_ids"]
        return BatchEncoding({"input_ids": [before + row + [tokenizer.eos_token_id] for row in rows]})


def ways_of(case: str, subject: Subject, directory: str) -> dict[str, Way]:
    """The ways to do a case, baselines first."""
    pairs = pairs_of(case, subject)
    closed = case == "sst-closed"
    comparisons = partial_rows.comparisons_of(pairs, subject.tokenizer, causal=subject.causal, closed=closed)
    orders = {
        "a row each": partial_rows.shuffled(comparisons),
        "a row each, by length": partial_rows.by_length(comparisons),
    }
    plain = partial_rows.score if case in ("scoring", "encoder") else partial_rows.train
    rows = sum(len(own["input_ids"]) for comparison in comparisons for own in (comparison.chosen, comparison.rejected))
    ways = {
        name: Way(partial(_afresh, subject.model, partial(plain, subject.model, subject.tokenizer, order)), rows)
        for name, order in orders.items()
    }
    format = _Closed() if closed else None
    reader = PrefixReader.for_model(subject.model, subject.tokenizer, Tokens(subject.tokenizer), format)
    if case in ("scoring", "encoder"):
        ours = partial(_score, PrefixScorer(subject.model, reader), pairs)
    else:
        arguments = TrainingArguments(output_dir=directory, use_cpu=True, report_to=[])
        trainer = PrefixTrainer(subject.model, arguments, reader, pairs)
        # About eight rows a batch, like the baselines.
        ours = partial(_train, trainer, WeighedInputs(pairs, reader), PairCollator(reader), 4 if subject.causal else 1)
    inputs = [own for weighed in pairs for own in reader.read(weighed.partial).inputs]
    ways[OURS] = Way(partial(_afresh, subject.model, ours), sum(len(own["input_ids"]) for own in inputs))
    return ways


def _afresh(model: PreTrainedModel, run: Callable[[], Any]) -> Any:
    model.zero_grad(set_to_none=True)
    return run()


def _train(trainer: PrefixTrainer, data: WeighedInputs, collate: PairCollator, pairs_a_batch: int) -> float:
    """The mean loss of all comparisons, as the trainer accumulates it."""
    batches = [range(first, min(first + pairs_a_batch, len(data))) for first in range(0, len(data), pairs_a_batch)]
    # The trainer takes all batches of a step before the first pass, too: it counts their labels.
    inputs = [collate([data[index] for index in batch]) for batch in batches]
    labels = sum(batch["labels"].numel() for batch in inputs)
    total = 0.0
    model: Any = trainer.model
    for batch in inputs:
        loss = trainer.compute_loss(model, batch, num_items_in_batch=labels)
        loss.backward()
        total += loss.item()
    return total


def _score(scorer: PrefixScorer, pairs: Sequence[WeighedPair]) -> list[tuple[float, float]]:
    scored = scorer.score([weighed.partial for weighed in pairs])
    return [rewards for own in scored for rewards in zip(own.chosen, own.rejected, strict=True)]


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """The numbers of tokens that are embedded within the context, one a pass."""
    passes: list[int] = []

    def count(module: nn.Module, positional: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        passes.append(positional[0].numel())

    handle = model.get_input_embeddings().register_forward_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


@dataclass
class Outcome:
    """What a run gave, the gradient of all parameters where it has one, and the tokens that entered the model."""

    result: Any
    gradients: dict[str, torch.Tensor]
    tokens: int


def outcome_of(way: Way, model: PreTrainedModel) -> Outcome:
    """Run once, counting."""
    with counted(model) as passes:
        result = way.run()
    gradients = {name: own.grad for name, own in model.named_parameters() if own.grad is not None}
    model.zero_grad(set_to_none=True)
    return Outcome(result, gradients, sum(passes))


def differences(ours: Outcome, other: Outcome) -> dict[str, float]:
    """Relative differences of losses and gradients, or of rewards.

    Raises:
        AssertionError: one exceeds its bound, or the gradients are not of the same parameters.
    """
    one, two = (torch.tensor(outcome.result, dtype=torch.float64) for outcome in (ours, other))
    found = {"reward" if one.dim() else "loss": float((one - two).abs().max() / two.abs().max())}
    assert ours.gradients.keys() == other.gradients.keys(), "gradients are of other parameters"
    if other.gradients:
        largest = max(gradient.abs().max() for gradient in other.gradients.values())
        apart = max((ours.gradients[name] - gradient).abs().max() for name, gradient in other.gradients.items())
        found["gradient"] = float(apart / largest)
    for name, value in found.items():
        bound = GRADIENT_BOUND if name == "gradient" else LOSS_BOUND
        assert value <= bound, f"{name}: {value:.1e} apart, more than {bound:.0e}"
    return found


def work_of(ways: dict[str, Way], model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Tokens of every way, and how far each baseline's results are from ours."""
    ours = outcome_of(ways[OURS], model)
    rows: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        if name != OURS:
            other = outcome_of(way, model)
            rows[name] = {"tokens": other.tokens, "unpadded": way.unpadded, "apart": differences(ours, other)}
    return rows | {OURS: {"tokens": ours.tokens, "unpadded": ways[OURS].unpadded}}


def format_rows(title: str, rows: dict[str, dict[str, Any]], target: float | None) -> str:
    """One line a way; ratios are those of ours against it."""
    lines = [
        f"\n{title}",
        f"{'':24}{'seconds':>9}{'ratio':>8}{'tokens':>9}{'ratio':>8}{'unpadded':>10}{'ratio':>8}{'peak MB':>9}  apart",
    ]
    ours = rows[OURS]
    for name, row in rows.items():
        peak = format(row["peak_bytes"] / 1e6, ".0f") if "peak_bytes" in row else ""
        ratio = row["seconds"] / ours["seconds"]
        apart = ", ".join(f"{what} {value:.1e}" for what, value in row.get("apart", {}).items())
        line = (
            f"{name:24}{row['seconds']:9.3f}{ratio:8.2f}{row['tokens']:9}{row['tokens'] / ours['tokens']:8.2f}"
            f"{row['unpadded']:10}{row['unpadded'] / ours['unpadded']:8.2f}{peak:>9}  {apart}"
        )
        if target is not None and name != OURS:
            line += f"; target {target:g}x {'met' if ratio >= target else 'missed'}"
        lines.append(line)
    return "\n".join(lines)


def subjects(models: Sequence[str], cases: Sequence[str]) -> Iterator[tuple[str, str, Subject]]:
    """Model, case and subject of everything that is asked for; the encoder has one size."""
    make = cache(build)
    for model in models:
        for case in cases:
            encodes = case.startswith("encoder")
            if not encodes or model == "512":
                yield model, case, make(model, causal=not encodes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.prm_training", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--model", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="peak memory too, each way in a process of its own")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    results = []
    torch.set_num_threads(1 if arguments.peak_of else arguments.threads[0])
    with tempfile.TemporaryDirectory() as directory:
        for model, case, subject in subjects(arguments.model, arguments.case):
            ways = ways_of(case, subject, directory)
            if arguments.peak_of:
                print(peak_growth(ways[arguments.peak_of].run))
                return 0
            known = work_of(ways, subject.model)
            if arguments.memory:
                for name in ways:
                    known[name]["peak_bytes"] = last_number_printed_by(
                        "benchmarks.prm_training", "--case", case, "--model", model, "--peak-of", name
                    )
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                measured = interleaved({name: way.run for name, way in ways.items()}, arguments.rounds)
                rows = {name: {"seconds": seconds} | known[name] for name, (_, seconds) in measured.items()}
                print(format_rows(f"{case}, {model}, {threads} thread(s)", rows, TARGETS.get(case)), flush=True)
                results.append({"model": model, "case": case, "threads": threads, "runs": rows})
    if arguments.json:
        write_results(arguments.json, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
