"""Partial responses and their inputs, against ids that the tokenizer's own functions give for each by itself."""

import pytest
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from ggro_hf.pairs import PartialPair, PreferencePair
from ggro_hf.rewards.formats import ChatTemplate, Dialogue, Pair, TextTemplate
from ggro_hf.training.prefix_reader import PairInputs, Place, PrefixReader, flat_places
from ggro_hf.training.units import Tokens, Words
from tests.ggro_hf.rewards.text_models import encoder_tokenizer, gemma_like_tokenizer, small_encoder
from tests.ggro_hf.small_models import small_reward, small_tokenizer

CLOSING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
PROMPT = "where is the otter"
CHOSEN = "the otter is in the sea and\n\n  the end is there"
REJECTED = "it is over"


def with_template(template, tokenizer=None):
    tokenizer = tokenizer or small_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def partial(*lengths, prompt=PROMPT, chosen=CHOSEN, rejected=REJECTED, row=3):
    return PartialPair(PreferencePair(row, prompt, chosen, rejected), lengths)


def ids_at(read, places):
    """The ids that end where each reward is read."""
    return [read.inputs[place.input]["input_ids"][: place.position + 1] for place in places]


def opened(tokenizer, text, prompt=PROMPT):
    """Ids of a response that stays open."""
    before = tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": prompt}]
        before = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    return before + tokenizer(text, add_special_tokens=False)["input_ids"]


def closed(tokenizer, text, prompt=PROMPT):
    """Ids of a conversation that ends with the response."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]


# Units


@pytest.mark.parametrize("tokenizer", [small_tokenizer(), gemma_like_tokenizer()])
@pytest.mark.parametrize("text", [CHOSEN, "", " ", "öé!!!! 한", "\n the"])
def test_tokens_are_counted_and_cut_without_special_tokens(tokenizer, text):
    unit = Tokens(tokenizer)
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert unit.ids(text) == ids
    assert unit.count(text) == len(ids)
    for length in range(1, len(ids) + 3):
        prefix = unit.prefix(text, length)
        # Nothing but the bytes of a character that is not complete may go.
        assert text.startswith(prefix)
        assert (prefix == text) == (length >= len(ids))
        whole = tokenizer.decode(ids[:length])
        assert prefix == whole.rstrip("\ufffd")
    lengths = [3, 1, None, len(ids) + 1, 1]
    assert unit.prefixes(text, lengths) == [unit.prefix(text, length or 99) for length in lengths]


@pytest.mark.parametrize(
    ("text", "length", "prefix", "rejoined"),
    [
        ("a  b\n\nc", 1, "a", "a"),
        ("a  b\n\nc", 2, "a  b", "a b"),
        (" a\tb c ", 2, " a\tb", "a b"),
        (" a\tb c ", 3, " a\tb c", " a\tb c "),
        (" a\tb c ", 4, " a\tb c ", " a\tb c "),
        ("", 1, "", ""),
        (" \n", 2, " \n", " \n"),
    ],
)
def test_words_end_with_their_last_word(text, length, prefix, rejoined):
    assert Words().prefix(text, length) == prefix
    assert Words(rejoin=True).prefix(text, length) == rejoined
    assert Words().count(text) == Words(rejoin=True).count(text) == len(text.split())


# Shared inputs


@pytest.mark.parametrize("template", [None, CLOSING_TEMPLATE])
def test_ids_that_begin_one_another_share_an_input(template):
    tokenizer = with_template(template)
    reader = PrefixReader(tokenizer, Tokens(tokenizer), causal=True)
    read = reader.read(partial(1, 2, 5, 9, None))
    assert read.row == 3
    assert len(read.inputs) == 2
    for text, places in ((CHOSEN, read.chosen), (REJECTED, read.rejected)):
        ids = opened(tokenizer, text)
        prompt = len(opened(tokenizer, ""))
        *partials, finished = ids_at(read, places)
        assert partials == [ids[: prompt + length] for length in (1, 2, 5, 9)]
        assert finished == (closed(tokenizer, text) if template else [*ids, tokenizer.eos_token_id])
        assert len({place.input for place in places}) == 1


def test_a_tokenizer_without_an_end_leaves_finished_responses_open():
    tokenizer = small_tokenizer()
    tokenizer.eos_token = None
    read = PrefixReader(tokenizer, Tokens(tokenizer), causal=True).read(partial(None))
    assert ids_at(read, read.rejected) == [opened(tokenizer, REJECTED)]


def test_a_response_shorter_than_a_length_stays_whole_and_open():
    tokenizer = small_tokenizer()
    unit = Tokens(tokenizer)
    read = PrefixReader(tokenizer, unit, causal=True).read(partial(unit.count(REJECTED), 40, 4000))
    assert ids_at(read, read.rejected) == [opened(tokenizer, REJECTED)] * 3
    assert len(set(read.rejected)) == 1
    assert ids_at(read, read.chosen)[2] == opened(tokenizer, CHOSEN)


def test_words_share_an_input_where_their_ids_do():
    tokenizer = small_tokenizer()
    read = PrefixReader(tokenizer, Words(), causal=True).read(partial(*range(1, 12), None))
    for text, places in ((CHOSEN, read.chosen), (REJECTED, read.rejected)):
        wanted = [opened(tokenizer, Words().prefix(text, length)) for length in range(1, 12)]
        assert ids_at(read, places)[:-1] == wanted
    assert len(read.inputs) == 2


def test_another_models_tokens_are_cut_as_text():
    policy = gemma_like_tokenizer(None)
    tokenizer = small_tokenizer()
    unit = Tokens(policy)
    read = PrefixReader(tokenizer, unit, causal=True).read(partial(1, 3, 6, chosen="the öther and"))
    texts = [unit.prefix("the öther and", length) for length in (1, 3, 6)]
    assert ids_at(read, read.chosen) == [opened(tokenizer, text) for text in texts]


def test_a_tokenizer_that_is_loaded_twice_has_the_same_tokens(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    twice = AutoTokenizer.from_pretrained(tmp_path)
    twice(["the", "and the"], padding=True)
    # Three bytes, of which a text would lose the first two.
    wanted = partial(1, 2, 3, None, chosen="한 the")
    own = PrefixReader(tokenizer, Tokens(tokenizer), causal=True).read(wanted)
    assert PrefixReader(tokenizer, Tokens(twice), causal=True).read(wanted) == own
    ids = opened(tokenizer, "한 the")
    prompt = len(opened(tokenizer, ""))
    assert ids_at(own, own.chosen)[:3] == [ids[: prompt + length] for length in (1, 2, 3)]
    # Another one's tokens cut the text.
    other = small_tokenizer()
    other.add_tokens("sea")
    read = PrefixReader(tokenizer, Tokens(other), causal=True).read(wanted)
    assert ids_at(read, read.chosen)[:3] == [ids[:prompt], ids[:prompt], ids[: prompt + 3]]


def test_equal_beginnings_of_both_responses_are_read_at_one_place():
    tokenizer = small_tokenizer()
    reader = PrefixReader(tokenizer, Tokens(tokenizer), causal=True)
    read = reader.read(partial(1, 2, 3, 6, None, chosen="the end is there", rejected="the end er"))
    same = [chosen == rejected for chosen, rejected in zip(read.chosen, read.rejected, strict=True)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the end is there", "the end er")]
    # A rounding between two passes would make a preference of what is a tie.
    assert same == [ids[0][:length] == ids[1][:length] for length in (1, 2, 3, 6)] + [False]
    assert True in same
    assert ids_at(read, read.rejected)[2] == opened(tokenizer, "") + ids[1][:3]
    encoder = encoder_tokenizer()
    read = PrefixReader(encoder, Words(), causal=False, format=Pair()).read(
        partial(1, 2, 3, chosen="a b c", rejected="a b d")
    )
    assert read.chosen[:2] == read.rejected[:2]
    assert read.chosen[2] != read.rejected[2]


# Inputs of their own


def test_rejoined_words_fall_back_where_white_space_differs():
    tokenizer = small_tokenizer()
    unit = Words(rejoin=True)
    reader = PrefixReader(tokenizer, unit, causal=True)
    # The white space between words 6 and 7 is not a single space.
    assert unit.prefix(CHOSEN, 8) != CHOSEN[: len(unit.prefix(CHOSEN, 8))]
    read = reader.read(partial(2, 4, 7, 8, 10, 11, None))
    texts = [unit.prefix(CHOSEN, length) for length in (2, 4, 7, 8, 10, 11)]
    assert ids_at(read, read.chosen) == [
        *(opened(tokenizer, text) for text in texts),
        [
            *opened(tokenizer, CHOSEN),
            tokenizer.eos_token_id,
        ],
    ]
    chosen = [place.input for place in read.chosen]
    # Rejoined: a chain of its own from the first word after that white space on; whole and finished: another.
    assert chosen[3] == chosen[4] != chosen[5] == chosen[6]
    assert len({*chosen}) == 2
    assert len({place.input for place in read.rejected}) == 1


def test_a_template_that_trims_gives_the_finished_response_an_input_of_its_own():
    tokenizer = gemma_like_tokenizer()
    reader = PrefixReader(tokenizer, Tokens(tokenizer), causal=True)
    read = reader.read(partial(1, 2, 4, None, chosen="  the end", rejected="the end"))
    for text, places in (("  the end", read.chosen), ("the end", read.rejected)):
        ids, prompt = opened(tokenizer, text), len(opened(tokenizer, ""))
        assert ids_at(read, places) == [*(ids[: prompt + length] for length in (1, 2, 4)), closed(tokenizer, text)]
    assert len({place.input for place in read.chosen}) == 2
    assert len({place.input for place in read.rejected}) == 1


def test_ids_that_merge_over_the_cut_fall_back():
    tokenizer = gemma_like_tokenizer(None)
    text = "!!!!!! and"
    unit = Words()
    reader = PrefixReader(tokenizer, Tokens(small_tokenizer()), causal=True)
    read = reader.read(partial(1, 2, 3, 4, None, chosen=text))
    texts = [Tokens(small_tokenizer()).prefix(text, length) for length in (1, 2, 3, 4)]
    assert ids_at(read, read.chosen)[:-1] == [opened(tokenizer, cut) for cut in texts]
    # "!!!!" is one token, "!!!" are two: neither begins with the other.
    assert len({place.input for place in read.chosen}) > 1
    assert unit.count(text) == 2


@pytest.mark.parametrize(
    "format", [ChatTemplate(gemma_like_tokenizer()), Dialogue(), TextTemplate("{prompt} {response} end")]
)
def test_a_format_writes_every_partial_response_by_itself(format):
    tokenizer = gemma_like_tokenizer()
    reader = PrefixReader(tokenizer, Words(), causal=True, format=format)
    read = reader.read(partial(1, 3, 8, None))
    for text, places in ((CHOSEN, read.chosen), (REJECTED, read.rejected)):
        texts = [Words().prefix(text, length) for length in (1, 3, 8)] + [text]
        rendered = [text.removeprefix("<bos>") for text in format.render(PROMPT, texts)]
        assert ids_at(read, places) == tokenizer(rendered)["input_ids"]
    # Whole responses are the same, finished or not.
    assert len({read.rejected[2], read.rejected[3]}) == 1


@pytest.mark.parametrize("unit", [Words(), Tokens(encoder_tokenizer()), Tokens(small_tokenizer())])
def test_an_encoder_reads_every_partial_response_by_itself(unit):
    tokenizer = encoder_tokenizer()
    reader = PrefixReader(tokenizer, unit, causal=False, format=Pair())
    read = reader.read(partial(1, 2, 3, 5, 500, None, chosen="ö the end", rejected=""))
    for text, places in (("ö the end", read.chosen), ("", read.rejected)):
        for length, place in zip((1, 2, 3, 5, 500, None), places, strict=True):
            cut = text if length is None else unit.prefix(text, length)
            expected = tokenizer([PROMPT], [cut])
            assert read.inputs[place.input] == {name: expected[name][0] for name in expected}
            assert place.position == 0
    assert len({*read.rejected}) == 1
    assert len(read.inputs) == len({tuple(encoded["input_ids"]) for encoded in read.inputs})


# What a model gets


def test_the_reader_of_a_model():
    tokenizer = small_tokenizer()
    causal = small_reward("llama", seed=1, vocabulary=len(tokenizer))
    reader = PrefixReader.for_model(causal, tokenizer, Words())
    assert (reader.causal, reader.format, reader.max_tokens) == (True, None, 512)
    format = Dialogue()
    assert PrefixReader.for_model(causal, tokenizer, Words(), format).format is format
    encoder = encoder_tokenizer(max_length=100)
    reader = PrefixReader.for_model(small_encoder(encoder), encoder, Words())
    assert (reader.causal, type(reader.format), reader.max_tokens) == (False, Pair, 100)
    with_template(CLOSING_TEMPLATE, encoder)
    config = BertConfig(vocab_size=len(encoder), hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    config.max_position_embeddings = 64
    reader = PrefixReader.for_model(BertForSequenceClassification(config), encoder, Words())
    assert (reader.causal, type(reader.format), reader.max_tokens) == (False, ChatTemplate, 64)
    with pytest.raises(ValueError, match="format is None, but an encoder reads whole texts"):
        PrefixReader(encoder, Words(), causal=False)


def test_messages_and_their_turns():
    tokenizer = with_template(CLOSING_TEMPLATE)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    read = PrefixReader(tokenizer, Tokens(tokenizer), causal=True).read(partial(1, None, prompt=turns))
    first, finished = ids_at(read, read.rejected)
    assert tokenizer.decode(first).startswith(
        "<|begin_of_text|>user:\na<|eot_id|>assistant:\nb<|eot_id|>user:\nc<|eot_id|>assistant:\ni"
    )
    assert tokenizer.decode(finished).endswith(f"user:\nc<|eot_id|>assistant:\n{REJECTED}<|eot_id|>")


@pytest.mark.parametrize("template", [None, CLOSING_TEMPLATE])
@pytest.mark.parametrize("response", [CHOSEN, "", " the  "])
def test_count_is_the_length_of_the_longest_input(template, response):
    tokenizer = with_template(template)
    reader = PrefixReader(tokenizer, Tokens(tokenizer), causal=True)
    read = reader.read(partial(1, 2, None, chosen=response))
    assert reader.count(PROMPT, response) == len(ids_at(read, read.chosen)[-1])


@pytest.mark.parametrize("unit", [Words(), Tokens(gemma_like_tokenizer())])
def test_what_count_admits_can_be_read_at_every_length(unit):
    tokenizer = gemma_like_tokenizer()
    # The template trims the finished response alone.
    response = "the end" + " \n" * 40
    reader = PrefixReader(tokenizer, unit, causal=True)
    limited = PrefixReader(tokenizer, unit, causal=True, max_tokens=reader.count(PROMPT, response))
    read = limited.read(partial(1, 5, 30, 300, None, chosen=response, rejected="er"))
    assert max(len(encoded["input_ids"]) for encoded in read.inputs) == limited.max_tokens


def test_over_long_and_unreadable_rows_are_named():
    tokenizer = small_tokenizer()
    unit = Tokens(tokenizer)
    tokens = PrefixReader(tokenizer, unit, causal=True).count(PROMPT, CHOSEN)
    PrefixReader(tokenizer, unit, causal=True, max_tokens=tokens).read(partial(None, row=9))
    short = PrefixReader(tokenizer, unit, causal=True, max_tokens=tokens - 1)
    with pytest.raises(
        ValueError, match=rf"row 9: prompt and response take {tokens} tokens, .* has {tokens - 1}; drop"
    ):
        short.read(partial(1, None, row=9))
    # What is asked of it fits.
    short.read(partial(1, row=9))
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    encoder = encoder_tokenizer()
    refusing = with_template("{{ raise_exception('no way') }}")
    for reader, prompt, message in (
        (short, " ", "row 9: prompt is empty"),
        (short, turns, "row 9: prompt is a list of messages"),
        (
            PrefixReader(encoder, Words(), causal=False, format=Pair()),
            turns,
            "row 9: prompt has the messages user, user",
        ),
        (PrefixReader(refusing, Words(), causal=True), PROMPT, "row 9: .*no way"),
    ):
        with pytest.raises(ValueError, match=message):
            reader.read(partial(1, None, prompt=prompt, row=9))


def test_no_lengths_need_no_inputs():
    tokenizer = small_tokenizer()
    encoder = encoder_tokenizer()
    for reader in (
        PrefixReader(tokenizer, Words(), causal=True),
        PrefixReader(encoder, Words(), causal=False, format=Pair()),
    ):
        assert reader.read(partial()) == PairInputs(3, [], [], [])


def test_places_of_a_batch_lie_row_after_row():
    pairs = [
        PairInputs(1, [{}, {}], [Place(0, 4), Place(0, 6)], [Place(1, 2), Place(0, 0)]),
        PairInputs(2, [], [], []),
        PairInputs(3, [{}], [Place(0, 1)] * 3, [Place(0, 5)] * 3),
        PairInputs(4, [{}, {}], [Place(0, 3)], [Place(1, 6)]),
    ]
    assert flat_places(pairs, 7) == [(4, 9), (6, 0), (15, 19), (15, 19), (15, 19), (24, 34)]
