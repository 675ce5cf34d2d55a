"""What all decoders share: the ways to call one, and the stopping rules."""

import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.models import check_room, context_length
from ggro_hf.policy import Policy, check_policy
from ggro_hf.prompts import Prompt, encode_prompt
from ggro_hf.reading import Reader
from ggro_hf.results import Counters, DecoderOutput, FinishReason, Generation
from ggro_hf.transfer import to_device

# Sampling settings that many checkpoints carry in their generation_config; they do not move the argmax of raw logits.
_SAMPLING_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

T = TypeVar("T")

MAX_BATCH_TOKENS = 8192
"""Tokens of prompts and responses that are decoded at once, where nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class Request:
    """One response to decode; `row` numbers it, so that random numbers do not depend on how prompts are batched.

    `prompt` and the policy's `tokenizer` are there where text came in; rewards that read text need them.
    """

    model: PreTrainedModel
    prompt_ids: list[int]
    max_new_tokens: int
    eos_ids: frozenset[int]
    row: int = 0
    prompt: Prompt | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def total(self) -> int:
        """Tokens of prompt and response at most."""
        return len(self.prompt_ids) + self.max_new_tokens


class Decoder(ABC):
    """A decoding method as an object, usable three ways.

    - `model.generate(**inputs, custom_generate=decoder)` returns the sequences, as `generate` does
      (the `DecoderOutput` with `return_dict_in_generate=True`).
    - `decoder(model, input_ids, max_new_tokens=128)` returns a `DecoderOutput`.
    - `ggro_hf.generate(model, tokenizer, prompts, decoder)` takes text and returns generations with text.

    Every row of a batch is decoded as if it were alone, several at once where the method can; left padding is marked by
    `attention_mask`.
    A `streamer` is bound to the decoder, since `generate` does not hand its own to a custom method.
    """

    def __init__(self, *, streamer: BaseStreamer | None = None) -> None:
        self.streamer = streamer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> DecoderOutput | torch.Tensor:
        """Decode every row of `input_ids[B, L]`.

        A plain call takes `max_new_tokens` (default: the model's generation config, else 128), `attention_mask[B, L]`
        and `max_batch_tokens` (see `respond_all`); the other arguments are those that `generate` passes. Raises
        ValueError for an empty prompt, `max_new_tokens` below 1, a prompt that does not fit the context, and processors
        or criteria that the method would have to ignore.
        """
        called_by_generate = logits_processor is not None
        config = generation_config or model.generation_config
        _refuse_processors(logits_processor or [])
        _refuse_criteria(stopping_criteria or [])
        rows = _unpadded_rows(input_ids, options.get("attention_mask"))
        if called_by_generate:
            max_new_tokens = config.max_length - input_ids.shape[1]
        else:
            max_new_tokens = _first_set(options.get("max_new_tokens"), config.max_new_tokens, 128)
        eos_ids = end_of_sequence_ids(model, config)
        requests = (Request(model, row, max_new_tokens, eos_ids, index) for index, row in enumerate(rows))
        generations = list(self.respond_all(requests, options.get("max_batch_tokens", MAX_BATCH_TOKENS)))
        output = DecoderOutput(_pad(input_ids, generations, _padding_id(config, eos_ids)), generations)
        if called_by_generate and not config.return_dict_in_generate:
            return output.sequences
        return output

    def respond(self, request: Request) -> Generation:
        """Decode one response. Raises ValueError where the request cannot be served, as `__call__` does.

        Whatever is raised has a note that says which row it was.
        """
        try:
            return self._respond(request)
        except Exception as error:
            error.add_note(f"while decoding row {request.row}")
            raise

    def respond_all(self, requests: Iterable[Request], max_batch_tokens: int) -> Iterator[Generation]:
        """Decode responses in order, as `respond` does: several at once where the method can.

        As many as have room for prompt, response and the candidates beside it in `max_batch_tokens`; one always does.
        What decoding one raises, or taking it from `requests`, is raised in its turn; those after it can still be had.
        """
        return map(self.respond, requests)

    def _respond(self, request: Request) -> Generation:
        check_request(request)
        counters = Counters()
        if self.streamer is not None:
            self.streamer.put(torch.tensor(request.prompt_ids, device="cpu"))
        # Tensors made in inference mode cannot take part in the reward's backward pass, even as constants.
        with torch.inference_mode(False), torch.no_grad():
            generation = self._decode(request, counters)
        if self.streamer is not None:
            self.streamer.end()
        return completed(generation, request)

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
        """Token ids of a text prompt for this method."""
        return encode_prompt(tokenizer, prompt)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError where the method cannot work with the policy's tokenizer; most need nothing of it."""
        return

    @abstractmethod
    def _decode(self, request: Request, counters: Counters) -> Generation: ...

    def _stream(self, token_ids: list[int]) -> None:
        if self.streamer is not None and token_ids:
            self.streamer.put(torch.tensor(token_ids, device="cpu"))


def open_policy(request: Request, counters: Counters, reader: Reader[T]) -> Policy[T]:
    """A policy with the prompt in its cache, and room for the response."""
    policy = Policy(request.model, counters, reader, capacity=request.total)
    with counters.phase("prefill"):
        policy.extend(list(request.prompt_ids))
    return policy


def check_request(request: Request) -> None:
    """Raise ValueError where a request is empty or does not fit the model."""
    check_policy(request.model)
    if not request.prompt_ids:
        raise ValueError("prompt has no tokens; give it text, or a tokenizer that prepends a begin-of-sequence token")
    if request.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {request.max_new_tokens}, but must be at least 1")
    check_room("policy", context_length(request.model), len(request.prompt_ids), request.max_new_tokens)


def completed(generation: Generation, request: Request) -> Generation:
    """A generation with what every method's has: memory, and texts where the prompt came as text."""
    generation.counters.peak_bytes = peak_bytes(request.model.device)
    if request.prompt is not None and request.tokenizer is not None:
        decode = request.tokenizer.decode
        generation.prompt = request.prompt if isinstance(request.prompt, str) else str(decode(request.prompt_ids))
        if generation.text is None:
            generation.text = str(decode(generation.token_ids, skip_special_tokens=True))
    return generation


def finish_reason(token_ids: list[int], request: Request) -> FinishReason:
    """Why a response ended there."""
    return "eos" if token_ids[-1] in request.eos_ids else "length"


def check_candidates(model: PreTrainedModel, candidates: int) -> None:
    """Raise ValueError where more tokens are wanted than the policy's vocabulary has."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if candidates > vocabulary:
        raise ValueError(f"candidates is {candidates}, but the policy's vocabulary has {vocabulary} tokens; lower it")


def end_of_sequence_ids(model: PreTrainedModel, config: GenerationConfig | None = None) -> frozenset[int]:
    """All end-of-sequence ids of the generation config, or of the model's configuration where it names none."""
    ids = _first_set((config or model.generation_config).eos_token_id, model.config.eos_token_id, [])
    return frozenset([ids] if isinstance(ids, int) else [int(index) for index in ids])


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: where the device is a GPU, what tensors took on all GPUs, else that of this process."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _first_set(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _refuse_processors(processors: list[Any]) -> None:
    foreign = [type(processor).__name__ for processor in processors if not isinstance(processor, _SAMPLING_WARPERS)]
    if foreign:
        raise ValueError(
            f"logits_processor holds {', '.join(foreign)}, but this method reads the policy's raw logits; "
            "remove it, or reset the setting of the generation config that adds it (repetition_penalty=1.0, say)"
        )


def _refuse_criteria(criteria: list[Any]) -> None:
    known = (MaxLengthCriteria, EosTokenCriteria)
    foreign = [type(criterion).__name__ for criterion in criteria if not isinstance(criterion, known)]
    if foreign:
        raise ValueError(
            f"stopping_criteria holds {', '.join(foreign)}, but this method stops at max_new_tokens and "
            "end-of-sequence only; remove it"
        )


def _unpadded_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, but must be [batch, length]")
    input_ids = input_ids.cpu()
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but must have that of "
            f"input_ids, {tuple(input_ids.shape)}"
        )
    mask = attention_mask.cpu().bool()
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError(
            "attention_mask marks padding on the right; pad prompts on the left (tokenizer.padding_side='left')"
        )
    return [row[keep].tolist() for row, keep in zip(input_ids, mask, strict=True)]


def _padding_id(config: GenerationConfig, eos_ids: frozenset[int]) -> int:
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    return min(eos_ids, default=0)


def _pad(input_ids: torch.Tensor, generations: list[Generation], padding_id: int) -> torch.Tensor:
    longest = max((len(generation.token_ids) for generation in generations), default=0)
    responses = [
        generation.token_ids + [padding_id] * (longest - len(generation.token_ids)) for generation in generations
    ]
    return torch.cat([input_ids.to(torch.long), to_device(responses, input_ids.device)], dim=1)
