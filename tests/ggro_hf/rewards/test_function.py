"""Functions as rewards: what they are called with, and what they may return."""

from math import inf, nan

import numpy as np
import pytest
import torch

from ggro_hf.results import Counters
from ggro_hf.rewards.base import Conversation
from ggro_hf.rewards.formats import TextTemplate
from ggro_hf.rewards.function import FunctionReward
from tests.ggro_hf.rewards.text_models import conversation
from tests.ggro_hf.small_models import END_OF_TURN, PAD, small_tokenizer

TOKENIZER = small_tokenizer()


def ids(text):
    return TOKENIZER(text)["input_ids"]


class Lengths:
    """Rewards a text by its length, and remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts):
        self.calls.append(texts)
        return [float(len(text)) for text in texts]


def opened(function, **settings):
    return FunctionReward(function, **settings).open(conversation("where"), Counters(), 10)


def test_a_text_is_prompt_and_response():
    function = Lengths()
    rewards = opened(function).score([[ids("the"), ids("there"), []]])
    before = "Human: where\n\nAssistant: "
    assert function.calls == [[before + "the", before + "there", before]]
    assert rewards == [[len(before) + 3.0, len(before) + 5.0, float(len(before))]]
    assert FunctionReward(function).score_response(conversation("where"), ids("the")) == rewards[0][0]


def test_a_format_chooses_the_text_and_needs_no_prompt():
    reward = FunctionReward(Lengths(), format=TextTemplate("{response}"))
    assert reward.score_response(Conversation([99999], None, TOKENIZER), ids("the")) == 3.0
    with pytest.raises(ValueError, match="no tokenizer"):
        reward.open(Conversation([1]), Counters(), 1)


def test_no_text_is_asked_for_twice():
    function = Lengths()
    scoring = opened(function, format=TextTemplate("{response}"), batch_size=2)
    spelled = [ids(letter)[0] for letter in "the"]
    rewards = scoring.score([[ids("the"), spelled, [*ids("the"), END_OF_TURN, PAD], ids("a"), ids("and")]])
    assert rewards == [[3.0, 3.0, 3.0, 1.0, 3.0]]
    assert function.calls == [["the", "a"], ["and"]]
    scoring.keep([(0, 0), (0, 4), (0, 1)])
    assert scoring.score([[ids("re"), []], [ids("re")], [ids("re")]]) == [[5.0, 3.0], [5.0], [5.0]]
    assert function.calls[2:] == [["there", "andre"]]
    scoring.keep([(2, 0)])
    assert scoring.score([[[]]]) == [[5.0]]
    assert len(function.calls) == 3


def test_texts_that_a_format_makes_equal_are_asked_for_once():
    function = Lengths()

    class Trimmed(TextTemplate):
        def render(self, prompt, responses):
            return [text.strip() for text in super().render(prompt, responses)]

    scoring = opened(function, format=Trimmed("{response}"))
    assert scoring.score([[ids("the"), ids("the "), ids(" the")]]) == [[3.0, 3.0, 3.0]]
    assert function.calls == [["the"]]


@pytest.mark.parametrize(
    "convert",
    [
        tuple,
        torch.tensor,
        np.array,
        lambda values: torch.tensor(values, dtype=torch.bfloat16, requires_grad=True),
        lambda values: np.array(values, dtype=np.int64),
        lambda values: [np.float32(value) for value in values],
        lambda values: [torch.tensor(value) for value in values],
        lambda values: [int(value) for value in values],
    ],
)
def test_tensors_arrays_and_numbers_are_welcome(convert):
    scoring = opened(lambda texts: convert([len(text) / 1.0 for text in texts]), format=TextTemplate("{response}"))
    rewards = scoring.score([[ids("the"), ids("a")]])
    assert rewards == [[3.0, 1.0]]
    assert all(type(value) is float for value in rewards[0])


def test_infinite_rewards_are_numbers():
    assert opened(lambda texts: [-inf for _ in texts]).score([[[]]]) == [[-inf]]


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ([1.0], ValueError, r"returned 1 rewards for 2 texts; return 2 numbers"),
        ([1.0, 2.0, 3.0], ValueError, r"returned 3 rewards for 2 texts"),
        (torch.ones(2, 1), ValueError, r"returned the shape \[2, 1\] for 2 texts; .* the shape \[2\]"),
        (torch.ones(1), ValueError, r"returned the shape \[1\]"),
        (np.ones((1, 2)), ValueError, r"returned the shape \[1, 2\]"),
        (torch.tensor(1.0), ValueError, r"returned the shape \[\]"),
        (None, TypeError, r"returned a NoneType for 2 texts"),
        (1.0, TypeError, r"returned a float for 2 texts"),
        ("12", TypeError, r"returned a str"),
        ({"a": 1.0, "b": 2.0}, TypeError, r"returned a dict"),
        (
            [1.0, "2"],
            TypeError,
            r"returned '2', a str, for continuation 1 of sequence 0, the text .*a'; return a number",
        ),
        ([1.0, None], TypeError, r"returned None, a NoneType, for continuation 1"),
        ([1.0, [2.0]], TypeError, r"returned \[2.0\], a list"),
        ([1.0, torch.ones(1)], TypeError, r".*a Tensor, for continuation 1"),
        (torch.ones(2, dtype=torch.complex64), TypeError, r".*a complex, for continuation 0"),
        ([1.0, nan], ValueError, r"returned NaN for continuation 1 of sequence 0, the text 'Human: where\\n\\nA.* a'"),
        (torch.tensor([nan, 1.0]), ValueError, r"returned NaN for continuation 0"),
    ],
)
def test_anything_else_says_what_came(result, error, message):
    with pytest.raises(error, match=r"reward function judge " + message):
        opened(_named_judge(result)).score([[ids("the"), ids("a")]])


def _named_judge(result):
    def judge(texts):
        return result

    return judge


def test_an_exception_names_the_text_and_is_chained():
    def judge(texts):
        if any("bad" in text for text in texts):
            raise KeyError("score")
        return [0.0] * len(texts)

    scoring = opened(judge, format=TextTemplate("{response}"))
    scoring.score([[ids("x"), ids("y")]])
    scoring.keep([(0, 0), (0, 1)])
    long = "bad" + 100 * "." + "end"
    with pytest.raises(RuntimeError) as caught:
        scoring.score([[ids("a"), ids("b")], [ids("a"), ids(long), ids("c")]])
    message = str(caught.value)
    assert (
        "reward function judge raised KeyError: 'score', for continuation 1 of sequence 1, the text 'ybad..." in message
    )
    assert message.endswith("...end'") and len(message) < 200
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_exception_of_a_batch_alone_says_so():
    def judge(texts):
        if len(texts) > 1:
            raise MemoryError("too many")
        return [0.0]

    with pytest.raises(RuntimeError, match=r"MemoryError: too many, for 2 texts together, .* continuation 0") as caught:
        opened(judge).score([[ids("a"), ids("b")]])
    assert isinstance(caught.value.__cause__, MemoryError)
    assert opened(judge, batch_size=1).score([[ids("a"), ids("b")]]) == [[0.0, 0.0]]


def test_impossible_settings():
    with pytest.raises(TypeError, match="function is a list"):
        FunctionReward([1.0])
    with pytest.raises(ValueError, match="batch_size is 0"):
        FunctionReward(Lengths(), batch_size=0)


def test_a_function_changes_nothing_by_changing_its_argument():
    def judge(texts):
        texts.reverse()
        return [float(len(text)) for text in reversed(texts)]

    assert opened(judge, format=TextTemplate("{response}")).score([[ids("the"), ids("a")]]) == [[3.0, 1.0]]
