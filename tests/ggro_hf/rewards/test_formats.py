"""Formats: what text and ids a reward model is given, against what the tokenizer's own functions make of it."""

import pytest

from ggro_hf.rewards.base import Conversation
from ggro_hf.rewards.formats import ChatTemplate, Dialogue, Pair, TextTemplate, default_format
from ggro_hf.rewards.responses import Responses, policy_tokenizer, prompt_of, response_texts
from tests.ggro_hf.rewards.text_models import conversation, encoder_tokenizer, gemma_like_tokenizer
from tests.ggro_hf.small_models import END_OF_TURN, small_tokenizer

MESSAGES = [
    {"role": "user", "content": "who"},
    {"role": "assistant", "content": " me "},
    {"role": "user", "content": "where"},
]


def test_a_chat_template_closes_the_turn_and_has_one_begin_token():
    tokenizer = gemma_like_tokenizer()
    text = "<bos><start_of_turn>user\nwhere<end_of_turn>\n<start_of_turn>model\nthere<end_of_turn>\n"
    format = ChatTemplate(tokenizer)
    assert format.render("where", [" there  "]) == [text]
    (ids,) = format.encode(tokenizer, "where", [" there  "])["input_ids"]
    # What transformers makes of the same conversation in one call.
    turns = [{"role": "user", "content": "where"}, {"role": "assistant", "content": " there  "}]
    assert ids == tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_begin_token_that_the_tokenizer_does_not_add_stays():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    format = default_format(tokenizer)
    (ids,) = format.encode(tokenizer, "the", ["and"])["input_ids"]
    assert tokenizer.decode(ids) == "<|begin_of_text|>the<|eot_id|>and<|eot_id|>"


def test_a_begin_token_in_a_literal_template_is_not_doubled():
    tokenizer = gemma_like_tokenizer(None)
    (ids,) = TextTemplate("<bos>{response}").encode(tokenizer, "", ["the"])["input_ids"]
    assert ids == tokenizer("the")["input_ids"]


def test_messages_keep_their_turns():
    tokenizer = gemma_like_tokenizer()
    rendered = ChatTemplate(tokenizer).render(MESSAGES, ["here", "there"])
    assert [text.count("<start_of_turn>") for text in rendered] == [4, 4]
    assert rendered[1].endswith("where<end_of_turn>\n<start_of_turn>model\nthere<end_of_turn>\n")
    assert Dialogue().render(MESSAGES, ["here"]) == ["Human: who\n\nAssistant:  me \n\nHuman: where\n\nAssistant: here"]


def test_messages_that_a_template_refuses():
    tokenizer = gemma_like_tokenizer("{{ raise_exception('no system role') if messages[0].role == 'system' }}")
    with pytest.raises(ValueError, match=r"refuses the messages system, user, assistant: no system role"):
        ChatTemplate(tokenizer).render([{"role": "system", "content": "x"}, *MESSAGES[:1]], ["y"])


def test_the_date_in_a_template_is_fixed():
    tokenizer = gemma_like_tokenizer("{{ date_string }}: {{ messages[-1].content }}")
    assert ChatTemplate(tokenizer).render("x", ["y"]) == ["26 Jul 2024: y"]


def test_literal_templates():
    format = TextTemplate("###Human: {prompt} ###Assistant: {response} {{}}")
    assert format.render("a {b}", ["{c}", ""]) == [
        "###Human: a {b} ###Assistant: {c} {}",
        "###Human: a {b} ###Assistant:  {}",
    ]
    assert format.reads_prompt
    assert not TextTemplate("{response}").reads_prompt


@pytest.mark.parametrize("template", ["{prompt} {answer} {response}", "{} {response}", "{response!r}", "{response:>5}"])
def test_other_fields_are_refused(template):
    with pytest.raises(ValueError, match=r"there are only \{prompt\} and \{response\}"):
        TextTemplate(template)
    with pytest.raises(ValueError, match=r"has no \{response\}"):
        TextTemplate("{prompt}")


def test_pairs_are_what_the_tokenizer_makes_of_two_texts():
    tokenizer = encoder_tokenizer()
    encoded = Pair().encode(tokenizer, "where", ["there", "here"])
    for index, response in enumerate(["there", "here"]):
        expected = tokenizer("where", response)
        assert {name: encoded[name][index] for name in encoded} == dict(expected)
    assert Pair().encode(tokenizer, MESSAGES[:1], ["here"])["input_ids"] == [tokenizer("who", "here")["input_ids"]]


@pytest.mark.parametrize("format", [Pair(), TextTemplate("{prompt} {response}")])
def test_several_turns_are_no_single_text(format):
    with pytest.raises(ValueError, match=r"messages user, assistant, user, but .* takes one text"):
        format.encode(encoder_tokenizer(), MESSAGES, ["here"])


def test_a_dialogue_has_no_system():
    with pytest.raises(ValueError, match="role 'system'"):
        Dialogue().render([{"role": "system", "content": "be brief"}], ["x"])


def test_the_default_follows_the_tokenizer():
    assert isinstance(default_format(gemma_like_tokenizer()), ChatTemplate)
    assert isinstance(default_format(gemma_like_tokenizer(None)), Dialogue)
    with pytest.raises(ValueError, match="no chat template"):
        ChatTemplate(gemma_like_tokenizer(None))


def test_responses_are_decoded_without_special_tokens_and_half_characters():
    tokenizer = small_tokenizer()
    ids = tokenizer("thé 🙂")["input_ids"]
    assert response_texts(tokenizer, [[*ids, END_OF_TURN]]) == ["thé 🙂"]
    # The emoji is four bytes, none of them merged.
    for cut in (1, 2, 3):
        assert response_texts(tokenizer, [ids[:-cut], [*ids[:-cut], END_OF_TURN]]) == ["thé ", "thé "]
    assert response_texts(tokenizer, []) == []
    # A broken character in the middle is what it is.
    assert response_texts(tokenizer, [[*ids[:-1], *tokenizer("a")["input_ids"]]]) == ["thé \ufffda"]


def test_responses_continue_and_split():
    tokenizer = small_tokenizer()
    first, second, third = (tokenizer(text)["input_ids"] for text in ("the", " and", "re"))
    responses = Responses(conversation())
    assert responses.extend([[first, second, []]]) == [["the", " and", ""]]
    responses.keep([(0, 0), (0, 1), (0, 0)])
    assert responses.extend([[third], [third, []], []]) == [["there"], [" andre", " and"], []]
    with pytest.raises(ValueError, match="1 lists for 3 sequences"):
        responses.extend([[third]])


def test_a_prompt_of_ids_alone_is_read_only_where_it_is_certain():
    plain = small_tokenizer()
    ids = plain("the and")["input_ids"]
    assert prompt_of(Conversation(ids, None, plain)) == "the and"
    # Other ids of the same text, and ids with special tokens, come from somewhere else.
    spelled = [plain(letter)["input_ids"][0] for letter in "the and"]
    for other in (spelled, [0, *ids], []):
        with pytest.raises(ValueError, match=r"ids that no text has.*ggro_hf\.generate"):
            prompt_of(Conversation(other, None, plain))
    chat = gemma_like_tokenizer()
    templated = chat.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=True)["input_ids"]
    with pytest.raises(ValueError, match="ids that no text has"):
        prompt_of(Conversation(templated, None, chat))
    assert prompt_of(Conversation(templated, "hi", chat)) == "hi"


def test_without_a_tokenizer_nothing_can_be_read():
    with pytest.raises(ValueError, match="pass tokenizer="):
        policy_tokenizer(Conversation([1, 2], "hi"))
    with pytest.raises(ValueError, match="pass tokenizer="):
        prompt_of(Conversation([1, 2]))
