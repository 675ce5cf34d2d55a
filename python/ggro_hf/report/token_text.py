"""The text that each token of a sequence adds, for display."""

from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"


def token_texts(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], context: Sequence[int] = ()
) -> list[str | None]:
    """What every token adds to the decoded text after `context`; special tokens show as they are spelt.

    A token that ends inside a character is None, and the token that completes the character carries it; a character
    that is never completed shows as U+FFFD at the last token.
    """
    ids = [*context, *token_ids]
    texts: list[str | None] = [None] * len(ids)
    # Decoding from `start` rather than from 0 keeps this linear; the tokens up to `end` are already told.
    start, end = 0, 0
    for index in range(len(ids)):
        before = str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
        text = str(tokenizer.decode(ids[start : index + 1], clean_up_tokenization_spaces=False))
        if text.endswith(_REPLACEMENT) and index + 1 < len(ids):
            continue
        texts[index] = text[len(before) :]
        start, end = end, index + 1
    return texts[len(context) :]


def visible(text: str) -> str:
    """`text` with white space spelt out, for places where a token stands alone."""
    return text.replace(" ", "␣").replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")
