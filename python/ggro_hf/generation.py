"""Text in, generations out."""

from collections.abc import Iterable, Iterator

from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Decoder, Request, end_of_sequence_ids
from ggro_hf.prompts import Prompt
from ggro_hf.results import Generation


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    decoder: Decoder,
    *,
    max_new_tokens: int = 128,
    progress: bool = True,
) -> list[Generation]:
    """Decode every prompt; one generation each, in order, with `prompt` and `text` filled in.

    A prompt is a string or a list of chat messages; the chat template is applied where the tokenizer has one.
    `progress` shows a bar over the prompts. Raises what the decoder raises, for the first prompt at fault.
    """
    prompts = list(prompts)
    responses = generate_iter(model, tokenizer, prompts, decoder, max_new_tokens=max_new_tokens)
    return list(tqdm(responses, total=len(prompts), desc=type(decoder).__name__, unit="prompt", disable=not progress))


def generate_iter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    decoder: Decoder,
    *,
    max_new_tokens: int = 128,
    first_row: int = 0,
) -> Iterator[Generation]:
    """Like `generate`, one generation at a time; `first_row` numbers the first prompt: random draws depend on it."""
    decoder.check_tokenizer(tokenizer)
    eos_ids = end_of_sequence_ids(model)
    for row, prompt in enumerate(prompts, start=first_row):
        prompt_ids = decoder.encode_prompt(tokenizer, prompt)
        generation = decoder.respond(Request(model, prompt_ids, max_new_tokens, eos_ids, row, prompt, tokenizer))
        generation.prompt = prompt if isinstance(prompt, str) else str(tokenizer.decode(prompt_ids))
        if generation.text is None:
            generation.text = str(tokenizer.decode(generation.token_ids, skip_special_tokens=True))
        yield generation
