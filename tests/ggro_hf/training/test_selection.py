"""Which pairs are left out, and that what is cut fits."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ggro_hf.pairs import PartialPair, PreferencePair
from ggro_hf.prompts import Prompt
from ggro_hf.rewards.formats import ChatTemplate, Dialogue
from ggro_hf.training.preferences import DIFFERENT_PROMPTS, Selection
from ggro_hf.training.prefix_reader import PrefixReader
from ggro_hf.training.selection import EMPTY_PROMPT, EMPTY_RESPONSE, IDENTICAL, OVER_LONG, REFUSED, select
from ggro_hf.training.units import Tokens
from tests.ggro_hf.small_models import small_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
    "{% endif %}<|begin_of_text|>{{ m.role }}: {{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|begin_of_text|>assistant: {% endif %}"
)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    made = small_tokenizer()
    made.chat_template = template
    return made


PLAIN, CHAT = tokenizer(), tokenizer(TEMPLATE)


def reader_of(tokenizer: PreTrainedTokenizerFast, **options: object) -> PrefixReader:
    return PrefixReader(tokenizer, Tokens(tokenizer), **{"causal": True, **options})


def selection(responses: Sequence[tuple[str, str]], prompt: Prompt = "Why?") -> Selection:
    return Selection([PreferencePair(row, prompt, *pair) for row, pair in enumerate(responses, start=1)], {})


def rows(selected: Selection) -> list[int]:
    return [pair.row for pair in selected.pairs]


def test_what_teaches_nothing_is_left_out() -> None:
    read = selection(
        [
            ("a", "b"),
            ("", "b"),
            ("a", " \n\t"),
            ("\u200b\ufeff", "b"),
            ("a", "a"),
            ("a\n", " a"),
            ("a", "A"),
            ("\x00", "b"),
        ]
    )
    read.pairs.append(PreferencePair(9, " ", "a", "b"))
    read.pairs.append(PreferencePair(10, [{"role": "user", "content": "\n"}], "a", "b"))
    read.pairs.append(PreferencePair(11, [], "a", "b"))
    read.dropped[DIFFERENT_PROMPTS] = [12]
    selected = select(read, reader_of(CHAT))
    assert rows(selected) == [1, 7]
    assert selected.dropped == {
        DIFFERENT_PROMPTS: [12],
        EMPTY_RESPONSE: [2, 3, 4, 8],
        IDENTICAL: [5, 6],
        EMPTY_PROMPT: [9, 10, 11],
    }
    assert selected.rows == read.rows == 12 and not selected.cut
    assert read.dropped == {DIFFERENT_PROMPTS: [12]}


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("limit_of", ["reader", "argument"])
def test_over_long_pairs_are_left_out(template: str | None, limit_of: str) -> None:
    reader = reader_of(tokenizer(template))
    read = selection([("x" * 20, "y"), ("x" * 21, "y"), ("y", "x" * 21), ("x", "y")])
    fits = reader.count("Why?", "x" * 20)
    assert fits == 20 + reader.count("Why?", "")
    if limit_of == "reader":
        reader.max_tokens = fits
        selected = select(read, reader, max_tokens=10 * fits)
    else:
        reader.max_tokens = 10 * fits
        selected = select(read, reader, max_tokens=fits)
    assert rows(selected) == [1, 4]
    assert selected.dropped == {OVER_LONG: [2, 3]}
    assert select(read, reader, max_response_tokens=20).dropped[OVER_LONG] == [2, 3]


def test_cut() -> None:
    reader = reader_of(PLAIN)
    beside = reader.count("Why?", "")
    read = selection([("x" * 8, "y" * 30), ("z" * 9, "z" * 11), ("x", "y"), ("\n" * 8 + "x", "y"), ("z" * 8, "z" * 30)])
    read.pairs.append(PreferencePair(6, "Why? " * beside, "x", "y"))
    selected = select(read, reader, max_tokens=beside + 8, overlong="cut")
    assert selected.pairs == [PreferencePair(1, "Why?", "x" * 8, "y" * 8), read.pairs[2]]
    assert selected.cut == {1}
    assert selected.dropped == {IDENTICAL: [2, 5], EMPTY_RESPONSE: [4], OVER_LONG: [6]}
    # What was cut once stays unfinished.
    assert select(selected, reader).cut == {1}
    shorter = select(selected, reader, max_response_tokens=3, overlong="cut")
    assert shorter.pairs == [PreferencePair(1, "Why?", "xxx", "yyy"), read.pairs[2]]


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="the and in é😀\n", min_size=1, max_size=40),
    st.text(alphabet="esr ,ther日", min_size=1, max_size=40),
    st.integers(1, 30),
    st.sampled_from(["open", "chat", "dialogue"]),
)
def test_what_is_cut_fits_and_begins_the_response(chosen: str, rejected: str, room: int, form: str) -> None:
    reader = {
        "open": reader_of(CHAT),
        "chat": reader_of(CHAT, causal=False, format=ChatTemplate(CHAT)),
        "dialogue": reader_of(PLAIN, format=Dialogue()),
    }[form]
    limit = reader.count("Why?", "") + room
    read = selection([(chosen, rejected), ("a", "b")])
    cut = select(read, reader, max_tokens=limit, overlong="cut")
    dropped = select(read, reader, max_tokens=limit)
    reader.max_tokens = limit
    for pair in cut.pairs:
        whole = read.pairs[pair.row - 1]
        for short, long in ((pair.chosen, whole.chosen), (pair.rejected, whole.rejected)):
            assert long.startswith(short)
            assert reader.count("Why?", short) <= limit
            assert short == long or reader.count("Why?", long) > limit
        assert (pair.row in cut.cut) == (pair != whole)
        reader.read(PartialPair(pair, (None,)))
    assert [pair for pair in cut.pairs if pair.row not in cut.cut] == dropped.pairs


def test_prompts_that_the_chat_template_refuses() -> None:
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    read = selection([("a", "b"), ("a", "b")])
    read.pairs[0] = PreferencePair(1, twice, "a", "b")
    for reader in (reader_of(CHAT), reader_of(CHAT, causal=False, format=ChatTemplate(CHAT))):
        selected = select(read, reader)
        assert rows(selected) == [2] and selected.dropped == {REFUSED: [1]}
    with pytest.raises(ValueError, match="row 1: prompt is a list of messages, but the tokenizer has no chat template"):
        select(read, reader_of(PLAIN))


def test_refused_arguments_and_nothing_left() -> None:
    read = selection([("a", "a"), ("b", "b"), ("", "a")])
    with pytest.raises(ValueError, match="no preference pair of 3 is left: 2 identical responses, 1 empty response"):
        select(read, reader_of(PLAIN))
    with pytest.raises(ValueError, match="overlong is 'shorten'; wanted 'drop' or 'cut'"):
        select(read, reader_of(PLAIN), overlong="shorten")
    for name in ("max_tokens", "max_response_tokens"):
        with pytest.raises(ValueError, match=f"{name} is 0, but must be at least 1"):
            select(read, reader_of(PLAIN), **{name: 0})
