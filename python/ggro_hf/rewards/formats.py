"""How a prompt and a response, finished or not, become the input of a reward model that reads text."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from string import Formatter

from jinja2 import TemplateError
from transformers import BatchEncoding
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.prompts import TEMPLATE_DATE, Prompt, as_messages, roles

_SPEAKERS = {"user": "Human", "assistant": "Assistant"}


class Format(ABC):
    """What a reward model reads of a prompt and its response."""

    reads_prompt = True
    """Whether the prompt is part of it."""

    @abstractmethod
    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, responses: Sequence[str]) -> BatchEncoding:
        """Inputs of the model (`input_ids` and what else its tokenizer makes), a list of tokens for every response.

        Nothing is cut off. Raises ValueError for a prompt that the format has no way to write.
        """


class TextFormat(Format):
    """A format that writes prompt and response as one text."""

    @abstractmethod
    def render(self, prompt: Prompt, responses: Sequence[str]) -> list[str]:
        """The text of every response. Raises ValueError for a prompt that the format has no way to write."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, responses: Sequence[str]) -> BatchEncoding:
        """Tokenise the texts with special tokens, a begin-of-sequence token that is there already only once."""
        texts = self.render(prompt, responses)
        begin = tokenizer.bos_token
        if begin and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            texts = [text.removeprefix(begin) for text in texts]
        return tokenizer(texts)


class ChatTemplate(TextFormat):
    """The chat template of a tokenizer, the response as the assistant's turn, which is closed even where the response
    is unfinished. Where a template inserts today's date, it gets a fixed one.

    Raises ValueError where the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "tokenizer has no chat template; use Dialogue() or TextTemplate('...{prompt}...{response}...')"
            )
        self._tokenizer = tokenizer

    def render(self, prompt: Prompt, responses: Sequence[str]) -> list[str]:
        before = as_messages(prompt)
        conversations = [[*before, {"role": "assistant", "content": response}] for response in responses]
        if not conversations:
            return []
        try:
            return list(self._tokenizer.apply_chat_template(conversations, tokenize=False, date_string=TEMPLATE_DATE))
        except TemplateError as error:
            raise ValueError(
                f"the reward model's chat template refuses the messages {roles(conversations[0])}: {error}; "
                "bring them into its order, or use Dialogue or TextTemplate"
            ) from error


class Dialogue(TextFormat):
    """Turns "Human: ..." and "Assistant: ...", empty lines between them; the response is the last."""

    def render(self, prompt: Prompt, responses: Sequence[str]) -> list[str]:
        turns = []
        for message in as_messages(prompt):
            speaker = _SPEAKERS.get(message["role"])
            if speaker is None:
                raise ValueError(
                    f"prompt has a message of role {message['role']!r}, but Dialogue writes user and assistant only; "
                    "put its text into a user's message, or use ChatTemplate"
                )
            turns.append(f"{speaker}: {message['content']}")
        return ["\n\n".join([*turns, f"Assistant: {response}"]) for response in responses]


class TextTemplate(TextFormat):
    """A text with the fields {prompt} and {response}, such as "###Human: {prompt} ###Assistant: {response}".

    The prompt may be left out; other braces are doubled, as for `str.format`. Raises ValueError for other fields.
    """

    def __init__(self, template: str) -> None:
        fields = [parts[1:] for parts in Formatter().parse(template) if parts[1] is not None]
        unknown = [
            name for name, spec, conversion in fields if name not in ("prompt", "response") or spec or conversion
        ]
        if unknown:
            raise ValueError(
                f"template {template!r} has the field {{{unknown[0]}}}, but there are only {{prompt}} and {{response}} "
                "without a format; write braces that are text as {{ and }}"
            )
        names = [name for name, _, _ in fields]
        if "response" not in names:
            raise ValueError(f"template {template!r} has no {{response}}; say where the response goes")
        self.template = template
        self.reads_prompt = "prompt" in names

    def render(self, prompt: Prompt, responses: Sequence[str]) -> list[str]:
        text = _only_text(prompt, "TextTemplate") if self.reads_prompt else ""
        return [self.template.format(prompt=text, response=response) for response in responses]


class Pair(Format):
    """Two texts, as encoders take them: `tokenizer(prompt, response)`."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, responses: Sequence[str]) -> BatchEncoding:
        return tokenizer([_only_text(prompt, "Pair")] * len(responses), list(responses))


def default_format(tokenizer: PreTrainedTokenizerBase) -> TextFormat:
    """The chat template of the reward model's tokenizer, `Dialogue` where it has none."""
    return Dialogue() if tokenizer.chat_template is None else ChatTemplate(tokenizer)


def _only_text(prompt: Prompt, name: str) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    raise ValueError(
        f"prompt has the messages {roles(prompt)}, but {name} takes one text; "
        "pass a string or one user's message, or use Dialogue or ChatTemplate"
    )
