"""Film reviews, their byte-level BPE tokenizer, and the token streams the demo models are trained on."""

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"

_LINE_BREAK = re.compile(r"<br\s*/?>")
_C1_CONTROLS = re.compile("[\x80-\x9f]")


@dataclass(frozen=True)
class Review:
    """One film review; `label` is 1 for a positive and 0 for a negative one."""

    text: str
    label: int


def clean_text(text: str) -> str:
    """Turn `<br />` marks into newlines and stray Windows-1252 bytes into the characters they stand for."""
    text = _C1_CONTROLS.sub(lambda match: match[0].encode("latin-1").decode("cp1252", errors="ignore"), text)
    return _LINE_BREAK.sub("\n", text).strip()


def read_reviews(path: Path) -> list[Review]:
    """Read a gzipped JSONL file of reviews, one object with `text` and `label` (0 or 1) per line.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a line is no such object; the message names the file and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no review file at {path}: the data directory needs train.jsonl.gz and val.jsonl.gz")
    reviews = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                review = Review(clean_text(row["text"]), int(row["label"]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} line {number}: {error!r}; wanted an object with a text and a label 0 or 1"
                ) from error
            if review.label not in (0, 1):
                raise ValueError(f"{path} line {number}: label is {review.label}; wanted 0 or 1")
            reviews.append(review)
    return reviews


def train_tokenizer(texts: list[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`; `<|begin|>` is prepended by the post-processor, any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
        padding_side="left",
    )


def encode_reviews(tokenizer: PreTrainedTokenizerFast, reviews: list[Review]) -> list[np.ndarray]:
    """Token ids of every review, `<|begin|>` first and `<|end|>` last, uint16."""
    encodings = tokenizer.backend_tokenizer.encode_batch([review.text for review in reviews])
    return [np.asarray([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16) for encoding in encodings]


class ReviewStream:
    """All reviews end to end, reshuffled every epoch, cut into steps of equally many tokens.

    A step is addressed by its number alone, so a resumed run needs no reader state.
    """

    def __init__(self, sequences: list[np.ndarray], tokens_per_step: int, seed: int) -> None:
        self._sequences = sequences
        self._tokens_per_step = tokens_per_step
        self._seed = seed
        self._epochs: dict[int, np.ndarray] = {}
        self.tokens_per_epoch = sum(map(len, sequences))

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._sequences))
            kept = {key: tokens for key, tokens in self._epochs.items() if key == epoch - 1}
            self._epochs = {**kept, epoch: np.concatenate([self._sequences[index] for index in order])}
        return self._epochs[epoch]

    def step(self, step: int, row_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and next-token targets of one step, both int64 `[tokens_per_step / row_length, row_length]`."""
        position = step * self._tokens_per_step
        pieces, missing = [], self._tokens_per_step + 1
        while missing:
            epoch, offset = divmod(position, self.tokens_per_epoch)
            piece = self._epoch(epoch)[offset : offset + missing]
            pieces.append(piece)
            position += len(piece)
            missing -= len(piece)
        tokens = torch.from_numpy(np.concatenate(pieces).astype(np.int64))
        return tokens[:-1].view(-1, row_length), tokens[1:].view(-1, row_length)


class RewardBatches:
    """Labelled reviews in right-padded batches of few shapes, reshuffled every epoch, addressed by step number.

    A review longer than the longest row is cut to its beginning or, every second time, to a random window of it. A
    review that is there to its end gets `<|end|>` with probability `end_probability`, so that open and finished text
    are both seen.
    """

    def __init__(
        self,
        sequences: list[np.ndarray],
        labels: list[int],
        row_lengths: tuple[int, ...],
        tokens_per_step: int,
        end_probability: float,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
    ) -> None:
        self._sequences = sequences
        self._labels = labels
        self._row_lengths = np.asarray(sorted(row_lengths))
        self._rows = [max(1, tokens_per_step // length) for length in sorted(row_lengths)]
        self._end_probability = end_probability
        self._pad = tokenizer.pad_token_id
        self._seed = seed
        lengths = np.asarray([len(sequence) for sequence in sequences])
        buckets = np.searchsorted(self._row_lengths, np.minimum(lengths, self._row_lengths[-1]))
        self._members = [np.flatnonzero(buckets == bucket) for bucket in range(len(self._row_lengths))]
        self.steps_per_epoch = sum(
            -(-len(members) // rows) for members, rows in zip(self._members, self._rows, strict=True)
        )
        self._plan: tuple[int, list[tuple[int, np.ndarray]]] = (-1, [])

    def _batches(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        if self._plan[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            batches = []
            for members, rows, row_length in zip(self._members, self._rows, self._row_lengths, strict=True):
                order = generator.permutation(members)
                for start in range(0, len(order), rows):
                    # The last batch of a shape is filled up from its first, so that no odd shape is compiled.
                    batches.append((int(row_length), np.resize(np.roll(order, -start), rows)))
            self._plan = (epoch, [batches[index] for index in generator.permutation(len(batches))])
        return self._plan[1]

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids int64 `[B, T]`, lengths int64 `[B]` and labels float32 `[B]` of one step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        row_length, members = self._batches(epoch)[index]
        generator = np.random.default_rng([self._seed, epoch, index])
        ids = torch.full((len(members), row_length), self._pad)
        lengths = torch.empty(len(members), dtype=torch.int64)
        for row, member in enumerate(members):
            tokens = self._excerpt(self._sequences[member], row_length, generator)
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            lengths[row] = len(tokens)
        return ids, lengths, torch.tensor([float(self._labels[member]) for member in members])

    def _excerpt(self, sequence: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
        start = 0
        if len(sequence) > length and generator.random() < 0.5:
            start = int(generator.integers(len(sequence) - length + 1))
        tokens = np.concatenate([sequence[:1], sequence[start + 1 : start + length]])
        reaches_end = start + length >= len(sequence)
        return tokens[:-1] if reaches_end and generator.random() >= self._end_probability else tokens
