"""What decoders know of the policy's side of one response: a sequence, and rows that continue it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from ggro_hf.cache import Branch
from ggro_hf.policy import Policy
from ggro_hf.reading import Position


class PolicyLane(ABC):
    """The policy's side of one response: a sequence, and rows that continue it.

    Rows are numbered from 0 up to `rows`. A row that has not grown yet continues the sequence as it then is.
    """

    @property
    @abstractmethod
    def rows(self) -> int:
        """Number of rows."""

    @property
    @abstractmethod
    def token_ids(self) -> list[int]:
        """The sequence."""

    @abstractmethod
    def clear(self, row: int) -> None:
        """Drop what the row has added."""

    @abstractmethod
    def commit(self, row: int, tokens: int) -> None:
        """Make the first tokens that a row has added part of the sequence; every row is cleared, or continues it."""

    @abstractmethod
    def save(self, row: int) -> Branch:
        """Copy what a row has added, with its keys and values."""

    @abstractmethod
    def append(self, branch: Branch) -> None:
        """Make a saved branch part of the sequence; every row is cleared."""

    @abstractmethod
    def move_to(self, token_ids: list[int]) -> Position:
        """Make the sequence `token_ids`, recomputing what follows the longest common prefix; every row is cleared."""


class SoloLane(PolicyLane):
    """A policy of one response's own, whose only row is the end of its sequence."""

    def __init__(self, policy: Policy[Position]) -> None:
        self.policy = policy
        self._length = len(policy.token_ids)

    @property
    def rows(self) -> int:
        return 1

    @property
    def token_ids(self) -> list[int]:
        return self.policy.token_ids[: self._length]

    def step(self, tokens: Mapping[int, int], *, run_ahead: bool) -> list[Position]:
        """Let the row grow by a token; see `Policy.extend`."""
        (token,) = tokens.values()
        return [self.policy.extend([token], run_ahead=run_ahead)]

    def clear(self, row: int) -> None:
        self.policy.rewind(self._length)

    def commit(self, row: int, tokens: int) -> None:
        self._length += tokens

    def save(self, row: int) -> Branch:
        return self.policy.save(self._length)

    def append(self, branch: Branch) -> None:
        self.policy.rewind(self._length)
        self.policy.restore(branch)
        self._length += len(branch.token_ids)

    def move_to(self, token_ids: list[int]) -> Position:
        position = self.policy.move_to(token_ids)
        self._length = len(token_ids)
        return position
