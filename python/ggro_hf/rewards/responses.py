"""Responses of a policy as the text, and the input, of a reward that reads text."""

from abc import abstractmethod
from collections.abc import Sequence

from transformers import BatchEncoding
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.prompts import Prompt, encode_prompt
from ggro_hf.rewards.base import Conversation, Scoring
from ggro_hf.rewards.formats import Format

_MEND = "call it through ggro_hf.generate"
# Characters of a long text that an error message shows: how the prompt begins, how the response ends.
_SHOWN_START, _SHOWN_END = 20, 35
_SHOWN_CHARACTERS = 60


def policy_tokenizer(conversation: Conversation) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. Raises ValueError where it is not known."""
    if conversation.tokenizer is None:
        raise ValueError(
            "this reward reads text, but the decoder was given token ids and no tokenizer; "
            f"{_MEND}, or pass tokenizer=... to the decoder"
        )
    return conversation.tokenizer


def prompt_of(conversation: Conversation) -> Prompt:
    """The prompt as it was given or, where only token ids are known, the text that has exactly these ids.

    Raises ValueError where there is no such text: that of a chat template's ids does not tell its messages.
    """
    if conversation.prompt is not None:
        return conversation.prompt
    tokenizer = policy_tokenizer(conversation)
    text = str(tokenizer.decode(conversation.prompt_ids, skip_special_tokens=True))
    if not text.strip() or encode_prompt(tokenizer, text) != conversation.prompt_ids:
        raise ValueError(
            "this reward reads the prompt as text, but the decoder was given token ids that no text has (those of a "
            f"chat template, say); {_MEND} with the text or the messages"
        )
    return text


def response_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[list[int]]) -> list[str]:
    """Responses as text, without special tokens and without the first bytes of a character whose others are to come."""
    if not token_ids:
        return []
    texts = tokenizer.batch_decode([list(ids) for ids in token_ids], skip_special_tokens=True)
    return [text.rstrip("\ufffd") for text in texts]


def name_of(place: tuple[int, int], text: str) -> str:
    """A continuation in an error message: which of which sequence, and its text, shortened."""
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_START]} ... {text[-_SHOWN_END:]}"
    return f"continuation {place[1]} of sequence {place[0]}, the text {shown!r}"


def check_prompt_fits(role: str, tokens: int, max_tokens: int | None) -> None:
    """Raise ValueError where a prompt with an empty response is too long for a model's context."""
    if max_tokens is not None and tokens > max_tokens:
        raise ValueError(
            f"prompt alone takes {tokens} tokens of the {role}, whose context has {max_tokens}; "
            "shorten the prompt or use a reward model with a longer context"
        )


def check_response_fits(role: str, tokens: int, max_tokens: int | None, place: tuple[int, int], text: str) -> None:
    """Raise ValueError where a prompt with that response is too long for a model's context."""
    if max_tokens is not None and tokens > max_tokens:
        raise ValueError(
            f"prompt and response take {tokens} tokens of the {role}, whose context has {max_tokens}, at "
            f"{name_of(place, text)}; lower max_new_tokens, shorten the prompt or use a reward model with a longer "
            "context"
        )


class PromptInputs:
    """What a reward model is given for one prompt and its responses; `prompt_tokens` is the length of an empty one.

    Raises ValueError where the prompt with an empty response does not fit `max_tokens`.
    """

    def __init__(
        self,
        format: Format,
        tokenizer: PreTrainedTokenizerBase,
        conversation: Conversation,
        max_tokens: int | None,
    ) -> None:
        self._format = format
        self._tokenizer = tokenizer
        self._prompt = prompt_of(conversation) if format.reads_prompt else ""
        self._max_tokens = max_tokens
        self.prompt_tokens = len(self._format.encode(tokenizer, self._prompt, [""])["input_ids"][0])
        check_prompt_fits("reward model", self.prompt_tokens, max_tokens)

    def encode(self, responses: list[str], places: list[tuple[int, int]]) -> BatchEncoding:
        """Inputs of different responses; `places` are sequence and continuation of each.

        Raises ValueError for the first that does not fit the context, or has no tokens.
        """
        encoded = self._format.encode(self._tokenizer, self._prompt, responses)
        for ids, response, place in zip(encoded["input_ids"], responses, places, strict=True):
            if not ids:
                raise ValueError(
                    f"the format gives the reward model no tokens at {name_of(place, response)}; "
                    "use one that writes the prompt"
                )
            check_response_fits("reward model", len(ids), self._max_tokens, place, response)
        return encoded


class Responses:
    """The sequences of a `Scoring`, as token ids of the policy, and their continuations as text."""

    def __init__(self, conversation: Conversation) -> None:
        self._tokenizer = policy_tokenizer(conversation)
        self._sequences: list[list[int]] = [[]]
        self._continued: list[list[list[int]]] = []

    def extend(self, continuations: Sequence[Sequence[list[int]]]) -> list[list[str]]:
        """The text of every continuation, its sequence before it.

        Raises ValueError unless there is a list of continuations for every sequence.
        """
        if len(continuations) != len(self._sequences):
            raise ValueError(
                f"continuations has {len(continuations)} lists for {len(self._sequences)} sequences; give one for each"
            )
        self._continued = [
            [sequence + list(continuation) for continuation in of_sequence]
            for sequence, of_sequence in zip(self._sequences, continuations, strict=True)
        ]
        texts = iter(response_texts(self._tokenizer, [ids for row in self._continued for ids in row]))
        return [[next(texts) for _ in row] for row in self._continued]

    def keep(self, chosen: Sequence[tuple[int, int]]) -> None:
        """Go on from these continuations."""
        self._sequences = [self._continued[sequence][continuation] for sequence, continuation in chosen]


class ResponseScoring(Scoring):
    """Scores every response by itself; of the kept ones it knows the rewards."""

    def __init__(self, conversation: Conversation) -> None:
        self._responses = Responses(conversation)
        self._texts: list[list[str]] = []
        self._known: dict[str, float] = {}

    def score(self, continuations: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        self._texts = self._responses.extend(continuations)
        places: dict[str, tuple[int, int]] = {}
        for sequence, texts in enumerate(self._texts):
            for continuation, text in enumerate(texts):
                if text not in self._known:
                    places.setdefault(text, (sequence, continuation))
        if places:
            rewards = self._compute(list(places), list(places.values()))
            self._known.update(zip(places, rewards, strict=True))
        return [[self._known[text] for text in texts] for texts in self._texts]

    def keep(self, chosen: Sequence[tuple[int, int]]) -> None:
        self._responses.keep(chosen)
        kept = {self._texts[sequence][continuation] for sequence, continuation in chosen}
        self._known = {text: self._known[text] for text in kept}

    @abstractmethod
    def _compute(self, responses: list[str], places: list[tuple[int, int]]) -> list[float]:
        """Rewards of different responses; `places` are sequence and continuation of each, for error messages."""
