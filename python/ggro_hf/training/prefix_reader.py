"""Partial responses as inputs of a reward model, as few as the model allows."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.models import context_length
from ggro_hf.pairs import PartialPair
from ggro_hf.prompts import Prompt, apply_template, as_messages, encode_prompt
from ggro_hf.rewards.formats import ChatTemplate, Format, Pair
from ggro_hf.training.packed import BranchMasks, Input, PackedInput, branch_masks_of
from ggro_hf.training.units import Tokens, Unit

Lengths = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a reward is read: at a position of one of several inputs."""

    input: int
    position: int


@dataclass(frozen=True, slots=True)
class PairInputs:
    """What a model reads of a `PartialPair`: `chosen[i]` and `rejected[i]` are the places of the i-th length."""

    row: int
    inputs: list[Input]
    chosen: list[Place]
    rejected: list[Place]


class PrefixReader:
    """Turns partial responses into inputs of a reward model.

    A causal model (`causal`) is read at any position, so partial responses whose token ids begin one and the same input
    share it: usually all those of a response, and one pass gives the reward of each. Those that end in tokens of their
    own, of a closed turn, are branches of it where the model's attention takes a mask (`masks`), else inputs of their
    own, as all are for an encoder. The ids are compared, never assumed to begin the longer ones.

    `format=None` writes the prompt with the assistant's turn opened and leaves a partial response open, as decoders
    that read the policy's token ids do; finished responses are closed as the chat template closes them, by the
    end-of-sequence token where there is none. Another format writes, and closes, every partial response by itself.

    Raises ValueError for an encoder without a format.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        *,
        causal: bool,
        format: Format | None = None,
        max_tokens: int | None = None,
        masks: BranchMasks | None = None,
    ) -> None:
        if format is None and not causal:
            raise ValueError("format is None, but an encoder reads whole texts; pass ChatTemplate(tokenizer) or Pair()")
        self.tokenizer = tokenizer
        self.unit = unit
        self.causal = causal
        self.format = format
        self.max_tokens = max_tokens
        self.masks = masks
        # Its own tokens need no text in between, which would change ids now and then.
        self._cuts_ids = (
            format is None and isinstance(unit, Tokens) and unit.tokenizer.get_vocab() == tokenizer.get_vocab()
        )

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        format: Format | None = None,
    ) -> "PrefixReader":
        """The reader of a sequence classifier: turns left open where it is causal, else what `EncoderReward` reads."""
        causal = hasattr(model, "score")
        if format is None and not causal:
            format = Pair() if tokenizer.chat_template is None else ChatTemplate(tokenizer)
        limits = [context_length(model)]
        if not causal:
            limits.append(tokenizer.model_max_length)
        max_tokens = min((limit for limit in limits if limit is not None), default=None)
        masks = branch_masks_of(model) if causal else None
        return cls(tokenizer, unit, causal=causal, format=format, max_tokens=max_tokens, masks=masks)

    def count(self, prompt: Prompt, response: str) -> int:
        """Tokens of the whole response behind the prompt, finished or not, whichever are more."""
        # A template that trims makes the finished response the shorter one.
        encoded = self._encoder(prompt)(response, (sys.maxsize, None))
        return max(len(row["input_ids"]) for row in encoded)

    def read(self, partial: PartialPair) -> PairInputs:
        """Inputs of a pair.

        Raises ValueError, the row named, for a prompt that cannot be written and for a pair that exceeds the model's
        context.
        """
        pair = partial.pair
        if not partial.lengths:
            return PairInputs(pair.row, [], [], [])
        try:
            encode = self._encoder(pair.prompt)
            wanted = [encode(response, partial.lengths) for response in (pair.chosen, pair.rejected)]
        except ValueError as error:
            raise ValueError(f"row {pair.row}: {error}") from error
        for encoded in (*wanted[0], *wanted[1]):
            tokens = len(encoded["input_ids"])
            if self.max_tokens is not None and tokens > self.max_tokens:
                raise ValueError(
                    f"row {pair.row}: prompt and response take {tokens} tokens, but the model's context has "
                    f"{self.max_tokens}; drop or cut over-long pairs"
                )
        if not self.causal:
            inputs: list[Input] = []
            chosen, rejected = ([_place_whole(encoded, inputs) for encoded in own] for own in wanted)
            return PairInputs(pair.row, inputs, chosen, rejected)
        packed: list[PackedInput] = []
        chosen, rejected = (self._place([encoded["input_ids"] for encoded in own], packed) for own in wanted)
        return PairInputs(pair.row, [row.encoded() for row in packed], chosen, rejected)

    def _place(self, wanted: list[list[int]], packed: list[PackedInput]) -> list[Place]:
        """Places of one response's partial responses; adds the inputs that they need.

        What the other response has too gets the same place: its reward from another pass might be a rounding apart,
        which would make a preference of a tie.
        """
        first = len(packed)
        places: dict[int, Place] = {}
        # Longest first, so that whatever begins another is met after it.
        for index in sorted(range(len(wanted)), key=lambda index: -len(wanted[index])):
            ids = wanted[index]
            found = [(number, row.find(ids)) for number, row in enumerate(packed)]
            if self.masks is not None and all(end is None for _, end in found):
                found = [(number, packed[number].branch(ids)) for number in range(first, len(packed))]
            number, end = next(((number, end) for number, end in found if end is not None), (len(packed), len(ids) - 1))
            if number == len(packed):
                packed.append(PackedInput(ids))
            places[index] = Place(number, end)
        return [places[index] for index in range(len(wanted))]

    def _encoder(self, prompt: Prompt) -> Callable[[str, Lengths], list[Input]]:
        if self.format is not None:
            format = self.format

            def formatted(response: str, lengths: Lengths) -> list[Input]:
                encoded = format.encode(self.tokenizer, prompt, self.unit.prefixes(response, lengths))
                return [{name: list(encoded[name][row]) for name in encoded} for row in range(len(lengths))]

            return formatted
        prompt_ids = encode_prompt(self.tokenizer, prompt)

        def open_turn(response: str, lengths: Lengths) -> list[Input]:
            rows = self._open(response, lengths)
            return [
                {
                    "input_ids": prompt_ids + ids
                    if length is not None
                    else self._closed(prompt, prompt_ids, response, ids)
                }
                for ids, length in zip(rows, lengths, strict=True)
            ]

        return open_turn

    def _open(self, response: str, lengths: Lengths) -> list[list[int]]:
        """Token ids of the partial responses, without special tokens."""
        if self._cuts_ids:
            ids = list(self.tokenizer(response, add_special_tokens=False)["input_ids"])
            return [ids[:length] for length in lengths]
        return list(self.tokenizer(self.unit.prefixes(response, lengths), add_special_tokens=False)["input_ids"])

    def _closed(self, prompt: Prompt, prompt_ids: list[int], response: str, response_ids: list[int]) -> list[int]:
        """The finished response; where the template writes it in other ids than the open one, those of the template."""
        if self.tokenizer.chat_template is not None:
            messages = [*as_messages(prompt), {"role": "assistant", "content": response}]
            return apply_template(self.tokenizer, messages, add_generation_prompt=False)
        end = self.tokenizer.eos_token_id
        return prompt_ids + response_ids + ([] if end is None else [end])


def _place_whole(encoded: Input, inputs: list[Input]) -> Place:
    """The place of an input of its own, or of an equal one."""
    if encoded not in inputs:
        inputs.append(encoded)
    return Place(inputs.index(encoded), 0)


def flat_places(pairs: Sequence[PairInputs], width: int) -> list[tuple[int, int]]:
    """Of every comparison of a batch, where its rewards are in `[inputs, width]` rewards, read row after row."""
    flat = []
    first = 0
    for pair in pairs:
        for chosen, rejected in zip(pair.chosen, pair.rejected, strict=True):
            flat.append(
                ((first + chosen.input) * width + chosen.position, (first + rejected.input) * width + rejected.position)
            )
        first += len(pair.inputs)
    return flat
