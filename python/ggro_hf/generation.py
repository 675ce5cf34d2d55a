"""Text in, generations out."""

from collections.abc import Iterable, Iterator
from itertools import count

from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import MAX_BATCH_TOKENS, Decoder, Request, end_of_sequence_ids
from ggro_hf.prompts import Prompt
from ggro_hf.results import Generation


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    decoder: Decoder,
    *,
    max_new_tokens: int = 128,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: bool = True,
) -> list[Generation]:
    """Decode every prompt; one generation each, in order, with `prompt` and `text` filled in.

    Methods that can decode several prompts at once, as many as have room for prompt, response and the candidates beside
    it in `max_batch_tokens`; a finished one makes room for the next, and running out of memory halves their number.

    A prompt is a string or a list of chat messages; the chat template is applied where the tokenizer has one.
    `progress` shows a bar over the prompts. Raises what the decoder raises, for the first prompt at fault.
    """
    prompts = list(prompts)
    responses = generate_iter(
        model, tokenizer, prompts, decoder, max_new_tokens=max_new_tokens, max_batch_tokens=max_batch_tokens
    )
    return list(tqdm(responses, total=len(prompts), desc=type(decoder).__name__, unit="prompt", disable=not progress))


def generate_iter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    decoder: Decoder,
    *,
    max_new_tokens: int = 128,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    rows: Iterable[int] | None = None,
) -> Iterator[Generation]:
    """Like `generate`, one generation at a time; `rows` numbers the prompts: random draws depend on it (0, 1, ...).

    Prompts are taken from the iterable as there is room for them. What the decoder raises for a prompt is raised in its
    turn, and so is what the iterable raises; the generations after it can still be had.
    """
    decoder.check_tokenizer(tokenizer)
    eos_ids = end_of_sequence_ids(model)

    def request(row: int, prompt: Prompt) -> Request:
        prompt_ids = decoder.encode_prompt(tokenizer, prompt)
        return Request(model, prompt_ids, max_new_tokens, eos_ids, row, prompt, tokenizer)

    return decoder.respond_all(map(request, count() if rows is None else rows, prompts), max_batch_tokens)
