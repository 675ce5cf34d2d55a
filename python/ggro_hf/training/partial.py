"""At which lengths the responses of a pair are compared: SP-PRM's partial sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.pairs import PartialPair, PreferencePair
from ggro_hf.training.preferences import Selection
from ggro_hf.training.units import Tokens, Unit, Words

# Texts tokenised at once.
_BATCH = 1024


@dataclass(frozen=True, slots=True)
class PartialRecipe:
    """Which pairs are taken and at which lengths they are compared (SP-PRM, section on partial sequences).

    Args:
        method: "tlt" (token-level traversal) compares at every length from `min_length` to that of the longer response,
            "sst" (stochastic sampling) at a few drawn ones, "finished" the finished responses alone, which trains an
            outcome reward model.
        unit: What lengths are counted in, "token" or "word".
        segments: K of the paper: "sst" draws 1 to 2K lengths where `draws` is "code", as the released code does, and
            0 to 2K where it is "paper".
        draws: See `segments`. "code" draws none for responses of one unit.
        replace: Draw with replacement: a length that comes twice is compared twice, as in the paper. Without, a
            response with no more lengths than are drawn is compared at all of them.
        min_length: The shortest length.
        include_full: Compare the finished responses as well.
        rejoin_words: Put single spaces between the words of partial responses, as the released code does.
        fraction: Share of the pairs that is taken, by a draw for each.
        limit: At most how many pairs are taken, at random; None for all.
        seed: Of the draws. Those of a pair depend on seed and row alone, not on the other pairs.

    Raises ValueError for a value out of its range, the field named.
    """

    method: Literal["sst", "tlt", "finished"] = "sst"
    unit: Literal["token", "word"] = "token"
    segments: int = 5
    draws: Literal["code", "paper"] = "code"
    replace: bool = False
    min_length: int = 1
    include_full: bool = True
    rejoin_words: bool = False
    fraction: float = 1.0
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", ("sst", "tlt", "finished")),
            ("unit", ("token", "word")),
            ("draws", ("code", "paper")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; wanted {' or '.join(map(repr, choices))}")
        for name in ("segments", "min_length", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}, but must be above 0 and at most 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}, but must be from 0 to 2**64 - 1")
        if self.method == "finished" and not self.include_full:
            raise ValueError("method is 'finished', but include_full is false; nothing would be compared")
        if self.rejoin_words and self.unit != "word":
            raise ValueError(f"rejoin_words is for words, but unit is {self.unit!r}; set unit='word'")

    @classmethod
    def as_released(cls) -> Self:
        """The released code of SP-PRM: drawn lengths of two words or more, joined by single spaces."""
        return cls(unit="word", min_length=2, rejoin_words=True)

    def make_unit(self, tokenizer: PreTrainedTokenizerBase) -> Unit:
        """What the recipe counts lengths in; tokens are those of the tokenizer."""
        return Tokens(tokenizer) if self.unit == "token" else Words(rejoin=self.rejoin_words)

    def take(self, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
        """The pairs that `fraction` and `limit` take, in their order."""
        place = {pair.row: self._generator(pair).random() for pair in pairs}
        taken = [pair for pair in pairs if place[pair.row] < self.fraction]
        if self.limit is not None and len(taken) > self.limit:
            last = sorted(place[pair.row] for pair in taken)[self.limit - 1]
            taken = [pair for pair in taken if place[pair.row] <= last]
        return taken

    def lengths(self, pair: PreferencePair, longest: int) -> tuple[int | None, ...]:
        """At which lengths a pair is compared whose longer response has the length `longest`, ascending; None, the
        last, for the finished responses.
        """
        full = (None,) * self.include_full
        if self.method == "finished":
            return full
        if self.method == "tlt":
            return (*range(self.min_length, longest + 1), *full)
        generator = self._generator(pair)
        # The first number decides whether the pair is taken.
        generator.random()
        number = int(generator.integers(0 if self.draws == "paper" else 1, 2 * self.segments, endpoint=True))
        possible = longest - self.min_length + 1
        if possible < 1 or (self.draws == "code" and longest < 2):
            return full
        size = number if self.replace else min(number, possible)
        drawn = generator.choice(possible, size=size, replace=self.replace)
        return (*sorted(int(length) + self.min_length for length in drawn), *full)

    def _generator(self, pair: PreferencePair) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, pair.row], dtype=np.uint64)))


def make_partial(selection: Selection, recipe: PartialRecipe, unit: Unit) -> list[PartialPair]:
    """The pairs that the recipe takes and their lengths, without those that are left with none.

    A pair with a response that was cut is not compared finished, since it is not. Raises ValueError where the unit is
    not the recipe's, and where no pair is left.
    """
    rejoins = isinstance(unit, Words) and unit.rejoin
    if unit.name != recipe.unit or rejoins != recipe.rejoin_words:
        raise ValueError(
            f"unit counts {unit.name}s{', rejoined' * rejoins}, but the recipe has unit={recipe.unit!r}, "
            f"rejoin_words={recipe.rejoin_words}; use the recipe's make_unit"
        )
    taken = recipe.take(selection.pairs)
    chosen = response_lengths(unit, [pair.chosen for pair in taken])
    rejected = response_lengths(unit, [pair.rejected for pair in taken])
    partials = []
    for pair, longest in zip(taken, map(max, chosen, rejected), strict=True):
        lengths = recipe.lengths(pair, longest)
        if pair.row in selection.cut:
            lengths = tuple(length for length in lengths if length is not None)
        if lengths:
            partials.append(PartialPair(pair, lengths))
    if not partials:
        raise ValueError(
            f"no comparison is left of {len(selection.pairs)} pairs, of which {len(taken)} were taken; raise fraction, "
            "lower min_length or set include_full=True"
        )
    return partials


def response_lengths(unit: Unit, responses: Sequence[str]) -> list[int]:
    """Lengths of responses; tokens are counted in batches."""
    if not isinstance(unit, Tokens):
        return [unit.count(response) for response in responses]
    lengths: list[int] = []
    for first in range(0, len(responses), _BATCH):
        encoded = unit.tokenizer(list(responses[first : first + _BATCH]), add_special_tokens=False)
        lengths += map(len, encoded["input_ids"])
    return lengths
