"""How a problem and the steps of its solution become the input of a process reward model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.prompts import Message, Prompt, apply_template, as_messages


class EncodedSteps(NamedTuple):
    """Input of a process reward model."""

    token_ids: list[int]
    positions: list[int]
    """For every step, the index of the token whose hidden state has its value."""


class StepFormat(ABC):
    """What a process reward model reads of a problem and the steps of a response to it.

    `separator` is what the policy writes between steps. `answers` are the words for a good and a bad step where the
    values are those that a language model gives them; None where the model has a head of its own.
    """

    separator: str
    answers: tuple[str, str] | None = None

    def steps(self, response: str) -> list[str]:
        """The steps of a response, an unfinished last one included; a response without any has one empty step."""
        steps = [step for step in response.split(self.separator) if step.strip()]
        return steps or [""]

    @abstractmethod
    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, steps: Sequence[str]) -> EncodedSteps:
        """Token ids of problem and steps; nothing is cut off.

        Raises ValueError for a prompt that the format has no way to write, and for a tokenizer that it does not suit.
        """


@dataclass(frozen=True)
class MarkedSteps(StepFormat):
    """A chat whose answer has a marker token after every step, where values are read (Qwen2.5-Math-PRM).

    `system` is the system message, unless the prompt has one.
    """

    marker: str = "<extra_0>"
    system: str | None = "Please reason step by step, and put your final answer within \\boxed{}."
    separator: str = "\n\n"

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, steps: Sequence[str]) -> EncodedSteps:
        messages = as_messages(prompt)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        # A marker that the policy wrote itself would count as a step.
        answer = "".join(step.replace(self.marker, "") + self.marker for step in steps)
        ids = _chat(tokenizer, [*messages, {"role": "assistant", "content": answer}])
        marker = _one_token(tokenizer, self.marker)
        return EncodedSteps(ids, _all([index for index, token in enumerate(ids) if token == marker], steps))


@dataclass(frozen=True)
class TaggedSteps(StepFormat):
    """Plain text, problem and steps, with a tag after every step; there, values are read (Math-Shepherd)."""

    tag: str = " ки"
    separator: str = "\n"
    answers: tuple[str, str] | None = ("+", "-")

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, steps: Sequence[str]) -> EncodedSteps:
        if not tokenizer.is_fast:
            raise ValueError(
                f"the reward model's tokenizer {type(tokenizer).__name__} does not tell which token belongs to which "
                "character, which TaggedSteps needs; use a fast one"
            )
        text, ends = _problem(prompt, self), []
        for number, step in enumerate(steps):
            text += f"{self.separator if number else ' '}{step}{self.tag}"
            ends.append(len(text))
        encoded = tokenizer(text, return_offsets_mapping=True)
        token_at = {end: index for index, (start, end) in enumerate(encoded["offset_mapping"]) if start < end}
        return EncodedSteps(list(encoded["input_ids"]), _all([token_at[end] for end in ends if end in token_at], steps))


@dataclass(frozen=True)
class StepTurns(StepFormat):
    """A chat with a user's turn for every step, each answered with the word for a good one (RLHFlow's PRMs).

    The value is read where the answer is predicted: at the token before it. The first turn begins with the problem.
    """

    separator: str = "\n\n"
    answers: tuple[str, str] | None = ("+", "-")

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, steps: Sequence[str]) -> EncodedSteps:
        assert self.answers is not None
        good = self.answers[0]
        texts = [step.strip() for step in steps]
        texts[0] = f"{_problem(prompt, self)} {texts[0]}"
        turns = [
            {"role": role, "content": text} for step in texts for role, text in (("user", step), ("assistant", good))
        ]
        ids = _chat(tokenizer, turns)
        opened, answer = _assistant_header(tokenizer), answer_ids(tokenizer, [good])[0]
        width = len(opened)
        found = [
            index - 1
            for index in range(width, len(ids))
            if ids[index] == answer and ids[index - width : index] == opened
        ]
        return EncodedSteps(ids, _all(found, steps))


@dataclass(frozen=True)
class EndedSteps(StepFormat):
    """Token ids of problem and steps one after another, an end after every step, at whose last token values are read.

    With `after_problem` a newline that is Skywork-o1-Open-PRM's input, without it that of TRL's `PRMTrainer`. Problem
    and steps are tokenised each by itself, after a begin-of-sequence token where the tokenizer has one.
    """

    after_problem: str = "\n"
    separator: str = "\n"

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, steps: Sequence[str]) -> EncodedSteps:
        ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        texts = [_problem(prompt, self) + self.after_problem, self.separator, *steps]
        problem, end, *encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids += problem
        positions = []
        for step in encoded:
            ids += step + end
            positions.append(len(ids) - 1)
        return EncodedSteps(ids, positions)


STEP_FORMATS: dict[str, StepFormat] = {
    "qwen-math-prm": MarkedSteps(),
    "math-shepherd": TaggedSteps(),
    "rlhflow-prm": StepTurns(),
    "skywork-o1-prm": EndedSteps(),
    "trl-prm": EndedSteps(after_problem=""),
}
"""Formats of published process reward models, by name."""


def answer_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """The token of each word, the last where a tokenizer puts another (a space) before it."""
    return [tokenizer.encode(word, add_special_tokens=False)[-1] for word in words]


def _all(found: list[int], steps: Sequence[str]) -> list[int]:
    """The places of the response, which is last: a prompt may have such tokens, too."""
    if len(found) < len(steps):
        raise ValueError(
            f"there are {len(found)} places to read the values of {len(steps)} steps: the reward model's tokenizer "
            "merges what marks them, or its chat template rewrites it; use the format of the reward model"
        )
    return found[-len(steps) :]


def _one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"the reward model's tokenizer makes {len(ids)} tokens of the marker {text!r}, but values are read at one; "
            "use the marker of the reward model"
        )
    return ids[0]


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, opened: bool = False) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "the reward model's tokenizer has no chat template, which this format needs; use TaggedSteps or EndedSteps"
        )
    return apply_template(tokenizer, messages, add_generation_prompt=opened)


def _assistant_header(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    turn: list[Message] = [{"role": "user", "content": "1"}]
    closed = _chat(tokenizer, turn)
    return _chat(tokenizer, turn, opened=True)[len(closed) :]


def _problem(prompt: Prompt, format: StepFormat) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    raise ValueError(
        f"prompt has the messages {', '.join(message['role'] for message in prompt)}, but {type(format).__name__} "
        "takes one problem; pass a string or one user's message"
    )
