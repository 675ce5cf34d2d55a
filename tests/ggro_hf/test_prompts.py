"""From text and messages to ids, plain and as released."""

import pytest

from ggro_hf.prompts import PREFILL, encode_prompt, released_prompt, released_response
from tests.ggro_hf.small_models import small_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ date_string }}"
)


@pytest.fixture
def chat_tokenizer():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_plain_text_without_a_template():
    tokenizer = small_tokenizer()
    assert encode_prompt(tokenizer, "the and") == tokenizer("the and").input_ids
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "the"}])


@pytest.mark.parametrize("prompt", ["", "  \n", []])
def test_empty(prompt):
    with pytest.raises(ValueError, match="prompt is empty"):
        encode_prompt(small_tokenizer(), prompt)


def test_a_template_opens_the_assistants_turn_and_pins_the_date(chat_tokenizer):
    expected = "<|user|>the<|eot_id|><|assistant|>26 Jul 2024"
    assert chat_tokenizer.decode(encode_prompt(chat_tokenizer, "the")) == expected
    assert encode_prompt(chat_tokenizer, [{"role": "user", "content": "the"}]) == encode_prompt(chat_tokenizer, "the")


def test_messages_that_a_template_refuses(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('user comes first') if messages[0].role == 'system' }}x"
    encode_prompt(chat_tokenizer, "the")
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError, match="refuses the messages system, user: user comes first"):
        encode_prompt(chat_tokenizer, messages)


def test_released_prompts_split_turns_and_leave_the_header_to_the_policy(chat_tokenizer):
    text = "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    decoded = chat_tokenizer.decode(released_prompt(chat_tokenizer, text))
    assert decoded == "<|user|>a<|eot_id|><|assistant|>b<|eot_id|><|user|>c<|eot_id|>26 Jul 2024"
    prefilled = chat_tokenizer.decode(released_prompt(chat_tokenizer, text, prefill_attack=True))
    assert prefilled.endswith("<|assistant|>26 Jul 2024" + PREFILL)


def test_released_response():
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert released_response(f"x<|eot_id|>{header} yes <|eot_id|>") == "yes"
    assert released_response("no header<|eot_id|>") == "no header<|eot_id|>"
