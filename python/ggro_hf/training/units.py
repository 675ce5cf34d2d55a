"""What partial responses are counted in: tokens or words."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_WORD = re.compile(r"\S+")


class Unit(ABC):
    """A way to count the length of a response and to cut it."""

    name: str

    @abstractmethod
    def count(self, response: str) -> int:
        """Length of a response."""

    @abstractmethod
    def prefix(self, response: str, length: int) -> str:
        """The beginning of a response, of that length; all of it where it is shorter."""

    def prefixes(self, response: str, lengths: Sequence[int | None]) -> list[str]:
        """The beginnings of those lengths; the whole response for None."""
        return [response if length is None else self.prefix(response, length) for length in lengths]


class Tokens(Unit):
    """Tokens of a tokenizer. A prefix that ends inside a character loses that character's bytes."""

    name = "token"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def ids(self, response: str) -> list[int]:
        """Token ids of a response, without special tokens."""
        return list(self.tokenizer(response, add_special_tokens=False)["input_ids"])

    def count(self, response: str) -> int:
        return len(self.ids(response))

    def prefix(self, response: str, length: int) -> str:
        return self._decoded(response, self.ids(response), length)

    def prefixes(self, response: str, lengths: Sequence[int | None]) -> list[str]:
        # Tokenised once for all lengths.
        ids = self.ids(response)
        return [self._decoded(response, ids, length) for length in lengths]

    def _decoded(self, response: str, ids: list[int], length: int | None) -> str:
        if length is None or length >= len(ids):
            return response
        return str(self.tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False)).rstrip("\ufffd")


class Words(Unit):
    """Words between white space. A prefix ends with its last word; the white space within it stays.

    `rejoin` puts single spaces between the words instead, as the released code of SP-PRM does, but for a response that
    stays whole.
    """

    name = "word"

    def __init__(self, *, rejoin: bool = False) -> None:
        self.rejoin = rejoin

    def count(self, response: str) -> int:
        return len(response.split())

    def prefix(self, response: str, length: int) -> str:
        if self.rejoin:
            words = response.split()
            return response if length >= len(words) else " ".join(words[:length])
        for number, word in enumerate(_WORD.finditer(response), start=1):
            if number > length:
                break
            end = word.end()
            if number == length:
                return response[:end]
        return response
