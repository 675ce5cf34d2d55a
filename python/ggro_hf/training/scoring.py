"""Rewards of partial responses by a model as it stands, a pass over every input."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ggro_hf.models import device_of, disagreement, embedding_rows
from ggro_hf.pairs import PairRewards, PartialPair
from ggro_hf.training.packed import Input, evaluating, is_computable, packed_batch, to_device_of
from ggro_hf.training.prefix_reader import PairInputs, Place, PrefixReader

# Which pair, an input of it, and the places there that are asked for.
_Wanted = tuple[int, Input, list[Place]]
_CHECK_TOKENS = 12
# A pass of so many tokens is worth its own start, rather than padding shorter inputs by more than this share.
_WORTHWHILE_TOKENS = 1024
_MOST_PADDING = 1 / 8


def pad_inputs(inputs: Sequence[Input], reader: PrefixReader) -> dict[str, Any]:
    """Inputs as a batch padded on the right, int64 `[inputs, T]`.

    A causal model gets no mask unless there are branches: what follows a token does not change its reward, and
    attention without one is faster.
    """
    if not reader.causal:
        return dict(reader.tokenizer.pad(list(inputs), padding_side="right", return_tensors="pt"))
    if reader.masks is not None and any("branch_starts" in row for row in inputs):
        return packed_batch(inputs, reader.masks)
    rows = [torch.tensor(row["input_ids"]) for row in inputs]
    # Any token will do: it is never read.
    return {"input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}


def check_causal(model: PreTrainedModel) -> None:
    """Raise ValueError unless the model's reward at a position is that of what ends there.

    Damaged weights pass: they are found where a row can be named. So do weights that are not here, but spread over
    processes.
    """
    if not is_computable(model):
        return
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    rows = embedding_rows(model)
    ids = [row if row != padding else (row + 1) % rows for row in ((7 * i + 1) % rows for i in range(_CHECK_TOKENS))]
    whole = torch.tensor([ids], device=device_of(model))
    ends = range(_CHECK_TOKENS // 2, _CHECK_TOKENS)
    with evaluating(model):
        plain = torch.stack([model(input_ids=whole[:, : end + 1]).logits[0, 0] for end in ends])
        if not plain.isfinite().all():
            return
        reason = disagreement(
            "rewards of the beginnings of a text",
            lambda: rewards_at(model, {"input_ids": whole}, [0] * len(ends), list(ends)),
            plain,
            model.dtype,
        )
    if reason is not None:
        raise ValueError(
            f"reward model is a {type(model).__name__}, which cannot be read at every position: {reason}; "
            "use one whose tokens see none that follow, or an encoder"
        )


def rewards_at(model: PreTrainedModel, batch: dict[str, Any], rows: list[int], positions: list[int]) -> torch.Tensor:
    """Rewards of a causal classifier at positions of rows of a batch."""
    classifier: Any = model
    hidden = classifier.base_model(**batch, use_cache=False).last_hidden_state
    return classifier.score(hidden[rows, positions])[:, 0]


class PrefixScorer:
    """A sequence classifier with one label that scores partial responses (evaluation mode, no gradients).

    `batch_tokens` is the most of a pass, padding included; a longer input has a pass of its own. Raises ValueError
    where the reader takes a model for causal that is not.
    """

    def __init__(self, model: PreTrainedModel, reader: PrefixReader, *, batch_tokens: int = 8192) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}, but must be at least 1")
        if reader.causal:
            check_causal(model)
        self.model = model.eval()
        self.reader = reader
        self.batch_tokens = batch_tokens

    def score(self, pairs: Sequence[PartialPair]) -> list[PairRewards]:
        """Rewards of every partial response of the pairs.

        Raises ValueError, the row named, for a pair that exceeds the model's context or a reward that is no number.
        """
        read = [self.reader.read(pair) for pair in pairs]
        rewards = self._rewards(read)
        return [
            PairRewards(
                inputs.row,
                partial.lengths,
                *(tuple(map(own.__getitem__, places)) for places in (inputs.chosen, inputs.rejected)),
            )
            for partial, inputs, own in zip(pairs, read, rewards, strict=True)
        ]

    @torch.inference_mode()
    def _rewards(self, read: Sequence[PairInputs]) -> list[dict[Place, float]]:
        """The reward at every place of every pair."""
        wanted: list[_Wanted] = []
        for number, inputs in enumerate(read):
            different = sorted({*inputs.chosen, *inputs.rejected}, key=lambda place: (place.input, place.position))
            for index, encoded in enumerate(inputs.inputs):
                wanted.append((number, encoded, [place for place in different if place.input == index]))
        rewards: list[dict[Place, float]] = [{} for _ in read]
        for batch in self._batches(wanted):
            rows = [row for row, (_, _, places) in enumerate(batch) for _ in places]
            places = [place for _, _, own in batch for place in own]
            values = self._forward([encoded for _, encoded, _ in batch], rows, [place.position for place in places])
            for row, place, value in zip(rows, places, values, strict=True):
                pair = batch[row][0]
                if not math.isfinite(value):
                    raise ValueError(f"row {read[pair].row}: the reward is {value}; the model's weights are damaged")
                rewards[pair][place] = value
        return rewards

    def _batches(self, wanted: list[_Wanted]) -> Iterator[list[_Wanted]]:
        """Inputs of similar length together."""
        batch: list[_Wanted] = []
        for item in sorted(wanted, key=lambda item: -len(item[1]["input_ids"])):
            length = len(item[1]["input_ids"])
            longest = len((batch or [item])[0][1]["input_ids"])
            full = (len(batch) + 1) * longest > self.batch_tokens
            padded = longest - length > _MOST_PADDING * longest and len(batch) * longest >= _WORTHWHILE_TOKENS
            if batch and (full or padded):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _forward(self, inputs: list[Input], rows: list[int], positions: list[int]) -> list[float]:
        """Rewards at positions of rows."""
        model: Any = self.model
        batch = to_device_of(self.model, pad_inputs(inputs, self.reader))
        if not self.reader.causal:
            return model(**batch).logits[:, 0].double()[rows].tolist()
        return rewards_at(model, batch, rows, positions).double().tolist()
