"""From generation records to one HTML file without external resources."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.prompts import Prompt
from ggro_hf.report.token_text import token_texts, visible

# Tokens of the prompt that are decoded along, so that a tokenizer that joins words writes the first one right.
_CONTEXT = 8


@dataclass(frozen=True, slots=True)
class ReportResponse:
    """One response: the method's name, its `generation_record`, and rewards on the scale shown in the page."""

    method: str
    record: Mapping[str, Any]
    reward: float | None
    gold: float | None = None


@dataclass(frozen=True, slots=True)
class ReportPrompt:
    """A prompt with the response shown as a heat map, and others shown as text beneath it."""

    prompt: Prompt
    response: ReportResponse
    others: Sequence[ReportResponse] = ()


@dataclass(slots=True)
class _Token:
    """A token of the heat map; `break_after` is its line breaks, which must stay outside the coloured box."""

    text: str
    break_after: str
    entropy: float | None
    shade: float
    segment: int | None = None
    opens: bool = False
    closes: bool = False
    old: str | None = None
    nudged: bool = False
    gain: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class _CandidateRow:
    text: str
    how: str
    forced: str
    reward: float | None
    gain: float | None
    chosen: bool
    proposals: list[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class _SegmentCard:
    first: int
    last: int
    entropy: float | None
    candidates: list[_CandidateRow]


@dataclass(frozen=True, slots=True)
class _Entry:
    prompt: Prompt
    response: ReportResponse
    tokens: list[_Token]
    segments: list[_SegmentCard]
    others: Sequence[ReportResponse]

    @property
    def gain(self) -> float | None:
        """Reward above that of the first other response."""
        if not self.others or self.response.reward is None or self.others[0].reward is None:
            return None
        return self.response.reward - self.others[0].reward


def write_report(
    path: str | Path,
    *,
    title: str,
    settings: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[ReportPrompt],
    methods: Sequence[Mapping[str, Any]] = (),
    entropy_threshold: float | None = None,
) -> None:
    """Write the page.

    `methods` are the rows of `evaluation.summarize` for the table on top; `entropy_threshold` (nats) is marked in the
    legend. Raises OSError where the file cannot be written.
    """
    scale = _entropy_scale(prompts, entropy_threshold)
    page = _template().render(
        title=title,
        settings=settings,
        methods=methods,
        columns={name: _interval_domain(methods, name) for name in ("reward", "gold")},
        entries=[_entry(tokenizer, prompt, scale) for prompt in prompts],
        scale=scale,
        threshold=entropy_threshold,
        css=Markup(_resource("report.css")),
        script=Markup(_resource("report.js")),
    )
    Path(path).write_text(page, encoding="utf-8")


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["signed"] = lambda value: f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    environment.filters["number"] = lambda value: f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
    return environment.from_string(_resource("report.html"))


def _resource(name: str) -> str:
    return files("ggro_hf.report").joinpath(name).read_text(encoding="utf-8")


def _entropy_scale(prompts: Sequence[ReportPrompt], threshold: float | None) -> float:
    """Nats at full colour: a round number that leaves only the top twentieth of all tokens saturated."""
    entropies = sorted(
        entropy for prompt in prompts for entropy in prompt.response.record["entropies"] if entropy is not None
    )
    high = entropies[int(0.95 * (len(entropies) - 1))] if entropies else 1.0
    return max(1.0, math.ceil(max(high, threshold if threshold and threshold < 12 else 0.0)))


def _interval_domain(methods: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    bounds = [bound for row in methods if row[f"{name}_ci95"] for bound in row[f"{name}_ci95"]]
    low, high = min(bounds, default=0.0), max(bounds, default=1.0)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _entry(tokenizer: PreTrainedTokenizerBase, prompt: ReportPrompt, scale: float) -> _Entry:
    record = prompt.response.record
    context = record["prompt_ids"][-_CONTEXT:]
    token_ids, entropies = record["token_ids"], record["entropies"]
    # The released text state re-tokenises between segments: its final ids may not match the trace one by one.
    aligned = len(entropies) == len(token_ids)
    tokens = [
        _token(text, entropies[index] if aligned else None, scale)
        for index, text in enumerate(token_texts(tokenizer, token_ids, context))
    ]
    cards = []
    position = 0
    for number, segment in enumerate(record["segments"]):
        chosen = segment["candidates"][segment["chosen_index"]]
        length = len(chosen["token_ids"])
        before = [*context, *token_ids[:position]][-_CONTEXT:]
        entropy = entropies[position] if aligned and position < len(entropies) else None
        cards.append(_segment_card(tokenizer, segment, position, entropy, before))
        _mark_segment(tokens[position : position + length], number, segment, cards[-1], tokenizer, before)
        position += length
    turns = prompt.prompt
    if isinstance(turns, str) and tokenizer.chat_template:
        turns = [{"role": "user", "content": turns}]
    return _Entry(turns, prompt.response, tokens, cards, prompt.others)


def _token(text: str | None, entropy: float | None, scale: float) -> _Token:
    note = "" if text is not None else "part of a character"
    shown = "⋯" if text is None else text
    body = shown.rstrip("\n")
    shade = 0.0 if entropy is None else min(1.0, entropy / scale)
    return _Token(body, shown[len(body) :], entropy, round(shade, 3), note=note)


def _mark_segment(
    tokens: list[_Token],
    number: int,
    segment: Mapping[str, Any],
    card: _SegmentCard,
    tokenizer: PreTrainedTokenizerBase,
    context: Sequence[int],
) -> None:
    if not tokens:
        return
    for token in tokens:
        token.segment = number
    tokens[0].opens = True
    tokens[-1].closes = True
    base, chosen = segment["candidates"][0], segment["candidates"][segment["chosen_index"]]
    offset = segment["insertion_offset"]
    replaced = token_texts(tokenizer, base["token_ids"], context)[offset:]
    for step in range(len(chosen["forced_tokens"])):
        if offset + step < len(tokens):
            token = tokens[offset + step]
            token.nudged = True
            token.old = _alone(replaced[step]) if step < len(replaced) else None
            token.gain = card.candidates[segment["chosen_index"]].gain if step == 0 else None


def _segment_card(
    tokenizer: PreTrainedTokenizerBase,
    segment: Mapping[str, Any],
    position: int,
    entropy: float | None,
    context: Sequence[int],
) -> _SegmentCard:
    base_reward = segment["candidates"][0]["reward"]
    offset = segment["insertion_offset"]
    searched = any(candidate["forced_tokens"] for candidate in segment["candidates"])
    rows = []
    for index, candidate in enumerate(segment["candidates"]):
        token_ids, reward = candidate["token_ids"], candidate["reward"]
        gain = None if index == 0 or None in (reward, base_reward) else reward - base_reward
        before = [*context, *token_ids[:offset]]
        rows.append(
            _CandidateRow(
                text="".join(text or "" for text in token_texts(tokenizer, token_ids, context)).replace("\n", "↵\n"),
                how=_origin(index, candidate, searched),
                forced=_join(token_texts(tokenizer, candidate["forced_tokens"], before)),
                reward=reward,
                gain=gain,
                chosen=index == segment["chosen_index"],
                proposals=[
                    (_join(token_texts(tokenizer, [token], before)), score) for token, score in candidate["proposals"]
                ],
            )
        )
    length = len(segment["candidates"][segment["chosen_index"]]["token_ids"])
    return _SegmentCard(position + 1, position + length, entropy, rows)


def _origin(index: int, candidate: Mapping[str, Any], searched: bool) -> str:
    """How a candidate came about; samples of best-of-N have nothing to say."""
    if candidate["forced_tokens"]:
        return "starts with the proposal"
    return "the policy by itself" if searched and index == 0 else ""


def _alone(text: str | None) -> str:
    """A token on its own: a space before a word stays one, white space alone is spelt out."""
    if text is None:
        return "⋯"
    return text if text.strip() and "\n" not in text else visible(text)


def _join(texts: Sequence[str | None]) -> str:
    return visible("".join(text or "⋯" for text in texts))
