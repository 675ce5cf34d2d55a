"""GGRO exactly as its authors released it: the state between segments is text, decoded and tokenised again."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Request
from ggro_hf.decoding.candidates import EndRules
from ggro_hf.decoding.segment_search import SegmentSearch
from ggro_hf.decoding.work import Decoding
from ggro_hf.prompts import END_OF_TURN, released_response
from ggro_hf.reading import TopK
from ggro_hf.results import Generation, Trace

_SMALLEST_PROBABILITY = 1e-9


@dataclass(frozen=True)
class ClampedTopK(TopK):
    """The entropy is that of clamped probabilities."""

    def rows_on_device(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        indices, logsumexp, _, values = super().rows_on_device(logits)
        probabilities = torch.softmax(logits.float(), dim=-1).clamp_min(_SMALLEST_PROBABILITY)
        return indices, logsumexp, -(probabilities * probabilities.log()).sum(-1), values


class NoProgressError(RuntimeError):
    """The released code would never terminate from here: a segment left the text as it was."""


def released_rules(tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> EndRules:
    """Every end-of-sequence id stops a segment, as does the end of turn spelled out; the tokenizer's finishes."""

    def stop(recent: list[int]) -> bool:
        if recent[-1] in eos_ids:
            return True
        if END_OF_TURN[-1] not in str(tokenizer.decode(recent[-1:])):
            return False
        before, after = (str(tokenizer.decode(tokens)).count(END_OF_TURN) for tokens in (recent[:-1], recent))
        return after > before

    return EndRules(frozenset([tokenizer.eos_token_id]), stop)


def decode_as_released(
    request: Request,
    tokenizer: PreTrainedTokenizerBase,
    search: SegmentSearch,
    insertion_offset: int,
    on_tokens: Callable[[list[int]], None],
) -> Decoding[Generation]:
    """One response, segment by segment, with text as the state.

    Raises NoProgressError where the released code would repeat the same segment for ever: a stop token that does not
    finish the response is dropped, and the empty candidate it leaves can win. Raises ValueError where the prompt
    grows past `max_new_tokens` when its text is tokenised again.
    """
    text = _decode(tokenizer, request.prompt_ids)
    prompt_length = len(_encode(tokenizer, text))
    if prompt_length >= request.total:
        raise ValueError(
            f"the prompt's {len(request.prompt_ids)} tokens become {prompt_length} when its text is tokenised again, "
            f"which leaves no room for max_new_tokens={request.max_new_tokens}; raise it, or use as_released=False"
        )
    trace = Trace()
    offset = insertion_offset
    states: set[tuple[str, int]] = set()
    while True:
        if (text, offset) in states:
            raise NoProgressError(
                f"after {len(trace.segments)} segments the text stays the same: a stop token other than "
                f"{tokenizer.eos_token!r} is dropped and the empty segment wins, which the released code repeats for "
                "ever; use as_released=False"
            )
        states.add((text, offset))
        ids = _encode(tokenizer, text)
        search.move_to(ids)
        segment = yield from search.refine(offset)
        chosen, offset = segment.chosen, 0
        trace.append(segment)
        on_tokens(list(chosen.token_ids))
        sequence = ids + list(chosen.token_ids)
        text = _decode(tokenizer, sequence)
        unfinished = text.removesuffix(END_OF_TURN)
        grown = len(_encode(tokenizer, unfinished)) - len(request.prompt_ids)
        if chosen.finished or grown >= request.max_new_tokens:
            break
        text = unfinished

    return Generation(
        prompt_ids=request.prompt_ids,
        token_ids=sequence[prompt_length:],
        finish_reason="eos" if chosen.finished else "length",
        reward=search.reward_of(_encode(tokenizer, text)),
        trace=trace,
        counters=search.counters,
        text=released_response(text),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """Decode as transformers 4 did: transformers 5 ignores `clean_up_tokenization_spaces` for BPE tokenizers."""
    text = str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
    return tokenizer.clean_up_tokenization(text) if tokenizer.clean_up_tokenization_spaces else text
