"""Preference pairs, and the lengths at which their responses are compared."""

from dataclasses import dataclass

from ggro_hf.prompts import Prompt


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt with a preferred and another response; `row` is its number in its source, from 1."""

    row: int
    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class PartialPair:
    """A pair and the lengths of the partial responses that are compared, in tokens or words, ascending.

    A response that is shorter than a length stays whole. None, the last if there, compares the finished responses.
    """

    pair: PreferencePair
    lengths: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class PairRewards:
    """Rewards of the partial responses of a `PartialPair`: one for each of its lengths."""

    row: int
    lengths: tuple[int | None, ...]
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]
