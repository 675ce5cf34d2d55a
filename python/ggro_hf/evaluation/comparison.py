"""Several decoding methods on the same prompts: one row of figures per method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from time import perf_counter
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Decoder
from ggro_hf.evaluation.metrics import distinct_n, diversity, mean_interval
from ggro_hf.generation import generate_iter
from ggro_hf.prompts import Prompt
from ggro_hf.results import Generation
from ggro_hf.rewards import Conversation, Reward

_WARM_UP_TOKENS = 4


@dataclass(slots=True)
class MethodRun:
    """What one method answered: a generation, a guiding and a gold reward per prompt, and the wall time of decoding."""

    method: str
    generations: list[Generation] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    gold_rewards: list[float] = field(default_factory=list)
    seconds: float = 0.0


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoders: Mapping[str, Decoder],
    *,
    guide: Reward,
    gold: Reward,
    max_new_tokens: int,
    progress: bool = True,
) -> list[MethodRun]:
    """Run every method on every prompt and score all responses with both rewards.

    Methods alternate within a prompt, so that a change of the machine's speed meets all of them; a short untimed run of
    each comes first. The timings are of decoding alone: scoring with `guide` and `gold` is not in them.
    """
    runs = [MethodRun(method) for method in decoders]
    for decoder in decoders.values():
        _respond(model, tokenizer, prompts[0], decoder, _WARM_UP_TOKENS, row=0)
    with tqdm(total=len(prompts) * len(runs), unit="response", disable=not progress) as bar:
        for row, prompt in enumerate(prompts):
            for run, decoder in zip(runs, decoders.values(), strict=True):
                bar.set_postfix_str(run.method, refresh=False)
                start = perf_counter()
                generation = _respond(model, tokenizer, prompt, decoder, max_new_tokens, row)
                run.seconds += perf_counter() - start
                conversation = Conversation(generation.prompt_ids, prompt, tokenizer)
                run.generations.append(generation)
                run.rewards.append(guide.score_response(conversation, generation.token_ids))
                run.gold_rewards.append(gold.score_response(conversation, generation.token_ids))
                bar.update()
    return runs


def summarize(run: MethodRun, baseline: MethodRun) -> dict[str, Any]:
    """One row of figures: means over responses with 95 % intervals `[low, high]`, work per response, tokens per second.

    `reward_gain` and `gold_gain` are means of the differences from `baseline` on the same prompts. `distinct_n` and
    `diversity` are means of the per-response figures over token n-grams; None where no response is long enough.
    """
    token_ids = [generation.token_ids for generation in run.generations]
    counters = [generation.counters for generation in run.generations]
    figures = {
        "reward": run.rewards,
        "gold": run.gold_rewards,
        "reward_gain": _differences(run.rewards, baseline.rewards),
        "gold_gain": _differences(run.gold_rewards, baseline.gold_rewards),
    }
    row: dict[str, Any] = {"method": run.method}
    for name, values in figures.items():
        interval = mean_interval(values)
        row[f"{name}_mean"] = interval and interval.mean
        row[f"{name}_ci95"] = interval and [interval.low, interval.high]
    for n in range(1, 5):
        row[f"distinct_{n}"] = _mean(distinct_n(ids, n) for ids in token_ids)
    products = mean_interval(map(diversity, token_ids))
    row["diversity"] = products and products.mean
    row["diversity_ci95"] = products and [products.low, products.high]
    row["response_tokens"] = fmean(map(len, token_ids))
    row["tokens_per_second"] = sum(map(len, token_ids)) / run.seconds
    row["policy_tokens"] = fmean(counter.policy_tokens for counter in counters)
    row["reward_forward_tokens"] = fmean(counter.reward_forward_tokens for counter in counters)
    row["reward_backward_tokens"] = fmean(counter.reward_backward_tokens for counter in counters)
    row["nudges_mean"] = fmean(generation.trace.nudges for generation in run.generations)
    row["seconds"] = run.seconds
    return row


def _respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    decoder: Decoder,
    max_new_tokens: int,
    row: int,
) -> Generation:
    return next(generate_iter(model, tokenizer, [prompt], decoder, max_new_tokens=max_new_tokens, rows=[row]))


def _differences(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value - other for value, other in zip(values, others, strict=True)]


def _mean(values: Any) -> float | None:
    defined = [value for value in values if value is not None]
    return fmean(defined) if defined else None
