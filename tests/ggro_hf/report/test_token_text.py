"""Token texts join to the decoded text, whatever the tokens cut through."""

import random

import pytest

from ggro_hf.report.token_text import token_texts, visible
from tests.ggro_hf.small_models import small_tokenizer


@pytest.mark.parametrize("text", ["The sea and the thing", "naïve café, naïve", "日本語 🐈‍⬛ ok", " \n\n\t x  y ", ""])
def test_the_texts_of_all_tokens_join_to_the_text(text):
    tokenizer = small_tokenizer()
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(part or "" for part in texts) == text


def test_a_character_is_carried_by_the_token_that_completes_it():
    tokenizer = small_tokenizer()
    ids = tokenizer("a🐈b")["input_ids"]
    assert token_texts(tokenizer, ids) == ["a", None, None, None, "🐈", "b"]
    assert token_texts(tokenizer, ids[:3]) == ["a", None, "\ufffd"]


def test_a_character_begun_in_the_context_is_completed():
    tokenizer = small_tokenizer()
    ids = tokenizer("a🐈b")["input_ids"]
    assert token_texts(tokenizer, ids[3:], context=ids[:3]) == [None, "🐈", "b"]


def test_random_tokens_join_to_what_the_tokenizer_decodes():
    tokenizer = small_tokenizer()
    choices = random.Random(0)
    for _ in range(200):
        ids = [choices.randrange(len(tokenizer)) for _ in range(choices.randrange(1, 30))]
        assert "".join(part or "" for part in token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_visible_spells_white_space_out():
    assert visible(" a\n\tb\r") == "␣a↵⇥b␍"
