"""From a prompt (text or messages) to token ids."""

import re
from typing import Any

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Message = dict[str, str]
Prompt = str | list[Message]

PREFILL = "Sure, I can help with that."

END_OF_TURN = "<|eot_id|>"
_ASSISTANT_HEADER = "<|start_header_id|>assistant<|end_header_id|>"

# Llama-3.2's chat template inserts today's date unless told otherwise, which would make outputs depend on the day.
TEMPLATE_DATE = "26 Jul 2024"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: through the chat template, with the assistant's turn opened, where the tokenizer has one.

    Raises ValueError where messages meet a tokenizer without a chat template, or where the prompt is empty.
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError("prompt is empty; give it at least one character")
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise ValueError("prompt is a list of messages, but the tokenizer has no chat template; pass a string")
        return list(tokenizer(prompt)["input_ids"])
    return apply_template(tokenizer, as_messages(prompt), add_generation_prompt=True)


def as_messages(prompt: Prompt) -> list[Message]:
    """The messages of a prompt; text is one of the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, add_generation_prompt: bool
) -> list[int]:
    """Token ids of messages through the tokenizer's chat template, the assistant's turn opened or not.

    Raises ValueError where the template refuses them.
    """
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=True, date_string=TEMPLATE_DATE
        )
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses the messages {roles(messages)}: {error}; bring them into its order"
        ) from error
    return list(encoded["input_ids"])


def roles(messages: list[Message]) -> str:
    """The roles of messages, for errors."""
    return ", ".join(message["role"] for message in messages)


def released_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, prefill_attack: bool = False) -> list[int]:
    """Token ids of a prompt as the released GGRO code builds them: "Human:" and "Assistant:" open turns, and the
    assistant's header is left for the policy to write, unless `prefill_attack` opens the answer with a compliant
    sentence.
    """
    messages = _parse_turns(prompt) if isinstance(prompt, str) else prompt
    ids = apply_template(tokenizer, messages, add_generation_prompt=False)
    if prefill_attack:
        opened = apply_template(tokenizer, messages, add_generation_prompt=True)
        ids = opened + list(tokenizer(PREFILL, add_special_tokens=False)["input_ids"])
    return ids


def released_response(text: str) -> str:
    """The answer in a conversation as the released code reads it: the last assistant turn, without its header and end.

    Where the policy never wrote the header, that is the whole text.
    """
    if _ASSISTANT_HEADER not in text:
        return text.strip()
    return text.rpartition(_ASSISTANT_HEADER)[2].partition(END_OF_TURN)[0].strip()


def _parse_turns(text: str) -> list[Message]:
    parts = re.split(r"(Human:|Assistant:)", text)
    turns = zip(parts[1::2], parts[2::2], strict=True)
    roles = {"Human:": "user", "Assistant:": "assistant"}
    return [{"role": roles[marker], "content": content.strip()} for marker, content in turns if content.strip()]
