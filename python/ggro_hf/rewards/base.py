"""What decoders know of a reward: it is opened on a prompt, scores continuations, and keeps some to go on from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.prompts import Prompt
from ggro_hf.results import Counters


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt as the policy reads it and, where known, as it was given; `tokenizer` is the policy's."""

    prompt_ids: list[int]
    prompt: Prompt | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What decides how candidates are scored.

    `reads_ids`: takes the policy's token ids, so that no text is made. `cached_prefix`: what candidates share is
    computed once. `tree`: candidates of one prefix go through one forward pass. `gradient`: it has gradients at its
    input embeddings, which GGRO needs. `max_tokens`: longest input in its own tokens, None for no limit.
    """

    reads_ids: bool
    cached_prefix: bool
    tree: bool
    gradient: bool
    max_tokens: int | None


class Scoring(ABC):
    """The rewards of one response while it is decoded: those of sequences, at first one (the prompt), and of their
    continuations.
    """

    @abstractmethod
    def score(self, continuations: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        """Rewards of continuations, token ids of the policy: a list for every sequence, in order.

        An empty continuation has the reward of the sequence itself. Equal continuations are computed once.
        """

    @abstractmethod
    def keep(self, chosen: Sequence[tuple[int, int]]) -> None:
        """Go on from continuations of the last `score`, each named by its sequence and its number there."""


class Reward(ABC):
    """Something that scores responses, finished or not: larger is better."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it can do."""

    @abstractmethod
    def open(self, conversation: Conversation, counters: Counters, max_new_tokens: int) -> Scoring:
        """Start scoring a response of at most that many tokens; the work is added to `counters`.

        Raises ValueError where prompt and response do not fit its context, or where it needs text that
        `conversation` does not have.
        """

    def check_tokenizer(self, policy_tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError where this reward cannot work with the policy's tokenizer; rewards that read text can."""
        return

    def score_response(self, conversation: Conversation, token_ids: list[int]) -> float:
        """Reward of one response."""
        return self.open(conversation, Counters(), len(token_ids)).score([[token_ids]])[0][0]
