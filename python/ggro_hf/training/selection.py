"""Which preference pairs are fit to compare their responses."""

import unicodedata
from dataclasses import replace
from typing import Literal

from jinja2 import TemplateError
from tqdm.auto import tqdm

from ggro_hf.pairs import PreferencePair
from ggro_hf.prompts import Prompt
from ggro_hf.training.preferences import Selection
from ggro_hf.training.prefix_reader import PrefixReader
from ggro_hf.training.units import Tokens

EMPTY_PROMPT = "empty prompt"
EMPTY_RESPONSE = "empty response"
IDENTICAL = "identical responses"
OVER_LONG = "over-long"
REFUSED = "refused by the chat template"


def select(
    read: Selection,
    reader: PrefixReader,
    *,
    max_tokens: int | None = None,
    max_response_tokens: int | None = None,
    overlong: Literal["drop", "cut"] = "drop",
    progress: bool = False,
) -> Selection:
    """Leave out the pairs that teach nothing or that the reward model cannot read, and say why.

    Left out are prompts and responses without a visible character, responses that are the same but for white space at
    their ends, prompts that the model's chat template refuses, and pairs over `max_tokens`, prompt and closed response
    together, or over `max_response_tokens`, both counted by the reader's tokenizer. The reader's own limit holds in any
    case. `overlong="cut"` shortens such responses instead; where nothing of one would be left, or what is left is
    identical, the pair is left out. `progress` shows a bar.

    Raises ValueError for limits below 1, for a prompt that the reader cannot write (row named), and where no pair is
    left.
    """
    limits = {"max_tokens": max_tokens, "max_response_tokens": max_response_tokens}
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}, but must be at least 1, or None for no limit")
    if overlong not in ("drop", "cut"):
        raise ValueError(f"overlong is {overlong!r}; wanted 'drop' or 'cut'")
    room = min((limit for limit in (max_tokens, reader.max_tokens) if limit is not None), default=None)
    fitting = _Fitting(reader, room, max_response_tokens, overlong == "cut")
    pairs, cut = [], set(read.cut)
    dropped = {reason: list(rows) for reason, rows in read.dropped.items()}
    for pair in tqdm(read.pairs, desc="checking pairs", unit="pair", disable=not progress):
        reason = _unfit(pair)
        kept: PreferencePair | str = reason if reason is not None else fitting.fit(pair)
        if isinstance(kept, PreferencePair) and kept is not pair:
            cut.add(pair.row)
            kept = _unfit(kept) or kept
        if isinstance(kept, str):
            dropped.setdefault(kept, []).append(pair.row)
        else:
            pairs.append(kept)
    if not pairs:
        reasons = ", ".join(f"{len(rows)} {reason}" for reason, rows in dropped.items())
        raise ValueError(f"no preference pair of {read.rows} is left: {reasons or 'there was none'}")
    return Selection(pairs, dropped, frozenset(pair.row for pair in pairs) & cut)


class _Fitting:
    """Makes pairs fit a reward model and the limits."""

    def __init__(self, reader: PrefixReader, room: int | None, response_room: int | None, cut: bool) -> None:
        self._reader = reader
        self._room = room
        self._response_room = response_room
        self._cut = cut
        self._tokens = Tokens(reader.tokenizer)

    def fit(self, pair: PreferencePair) -> PreferencePair | str:
        """The pair, cut where that is wanted and needed, or why it is dropped."""
        try:
            responses = [self._fit(pair.prompt, response) for response in (pair.chosen, pair.rejected)]
        except ValueError as error:
            if isinstance(error.__cause__, TemplateError):
                return REFUSED
            raise ValueError(f"row {pair.row}: {error}") from error
        chosen, rejected = responses
        if chosen is None or rejected is None:
            return OVER_LONG
        if (chosen, rejected) == (pair.chosen, pair.rejected):
            return pair
        return replace(pair, chosen=chosen, rejected=rejected)

    def _fit(self, prompt: Prompt, response: str) -> str | None:
        """The response, or what fits of it; None where that is nothing."""
        excess = self._excess(prompt, response)
        if excess <= 0:
            return response
        if not self._cut:
            return None
        length = self._tokens.count(response)
        # A beginning decoded and encoded again may have other tokens, hence not always in one step.
        while excess > 0:
            length -= excess
            if length < 1:
                return None
            shortened = self._tokens.prefix(response, length)
            excess = self._excess(prompt, shortened)
        return shortened

    def _excess(self, prompt: Prompt, response: str) -> int:
        """By how many tokens the response exceeds what it may have, 0 or less where it fits."""
        tokens = self._reader.count(prompt, response)
        over = 0 if self._room is None else tokens - self._room
        if self._response_room is not None:
            over = max(over, self._tokens.count(response) - self._response_room)
        return over


def _unfit(pair: PreferencePair) -> str | None:
    """Why a pair cannot be compared whatever the model; None where it can."""
    prompt = pair.prompt if isinstance(pair.prompt, str) else "".join(message["content"] for message in pair.prompt)
    if not _visible(prompt):
        return EMPTY_PROMPT
    if not (_visible(pair.chosen) and _visible(pair.rejected)):
        return EMPTY_RESPONSE
    return IDENTICAL if pair.chosen.strip() == pair.rejected.strip() else None


def _visible(text: str) -> bool:
    """Whether any character leaves a mark: none of white space, control and zero-width characters does."""
    return any(unicodedata.category(character) not in ("Cc", "Cf", "Zs", "Zl", "Zp") for character in text)
