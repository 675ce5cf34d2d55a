"""Rewards of partial responses against plain transformers: one pass of the whole model for each of them."""

import itertools
from collections import Counter

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from ggro_hf.models import TOLERANCE
from ggro_hf.pairs import PairRewards, PartialPair, PreferencePair
from ggro_hf.rewards.formats import ChatTemplate, Dialogue, Pair
from ggro_hf.training.prefix_reader import PrefixReader
from ggro_hf.training.scoring import PrefixScorer, pad_inputs
from ggro_hf.training.units import Tokens, Words
from tests.ggro_hf.rewards.text_models import encoder_tokenizer, gemma_like_tokenizer, small_encoder
from tests.ggro_hf.small_models import SLIDING_WINDOW, small_config, small_reward, small_tokenizer

FAMILIES = ("llama", "gemma3", "qwen3")
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, None)
TEXTS = [
    ("where is the otter", "the otter is in the sea and\n\n  the end is there", "it is over"),
    ("who", "", "  an answer that begins with spaces and goes on and on and on and on and on"),
    ("a much longer prompt, so that batches have rows of many lengths, and the pads are many", "ö", "é!!!! the"),
    ("where is it", "in the sea", "in the sea, is it"),
]
PAIRS = [
    PartialPair(PreferencePair(row, *texts), LENGTHS[row % 3 :] if row % 2 else LENGTHS)
    for row, texts in enumerate(TEXTS, start=1)
]
CHOSEN_THEN_REJECTED = ("chosen", "rejected")


def causal(family, tokenizer):
    model = small_reward(family, seed=2, vocabulary=len(tokenizer), dtype=torch.float32, layers=3)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def bert(tokenizer):
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return BertForSequenceClassification(config).eval()


def open_turn(tokenizer, prompt, response, cut):
    """Ids of a partial response, `cut` of its ids or text, as transformers' own functions make them."""
    turns = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is None:
        before = tokenizer(prompt)["input_ids"]
    else:
        before = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    if cut is None and tokenizer.chat_template is not None:
        turns.append({"role": "assistant", "content": response})
        return tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    if isinstance(cut, str):
        return before + tokenizer(cut, add_special_tokens=False)["input_ids"]
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return before + (ids[:cut] if cut is not None else [*ids, tokenizer.eos_token_id])


def plain(model, inputs):
    with torch.no_grad():
        return model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits[0, 0].item()


def expected(pairs, reward):
    """Rewards by `reward(prompt, response, length)`."""
    return [
        PairRewards(
            partial.pair.row,
            partial.lengths,
            *(
                tuple(reward(partial.pair.prompt, getattr(partial.pair, name), length) for length in partial.lengths)
                for name in CHOSEN_THEN_REJECTED
            ),
        )
        for partial in pairs
    ]


def check(scored, wanted, tolerance=2e-5):
    assert len(scored) == len(wanted)
    values = []
    for own, other in zip(scored, wanted, strict=True):
        assert (own.row, own.lengths) == (other.row, other.lengths)
        for name in CHOSEN_THEN_REJECTED:
            assert getattr(own, name) == pytest.approx(getattr(other, name), abs=tolerance)
            values += getattr(own, name)
    # Rewards that are all about the same would agree with anything.
    assert torch.tensor(values).std() > 0.1


def count_passes(model):
    """How many rows the model is given."""
    rows = Counter()
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: rows.update(rows=len(args[0]), passes=1))
    return rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["none", "gemma"])
def test_one_pass_a_response_gives_what_separate_passes_give(family, template):
    tokenizer = small_tokenizer() if template == "none" else gemma_like_tokenizer()
    model = causal(family, tokenizer)
    scorer = PrefixScorer(model, PrefixReader.for_model(model, tokenizer, Tokens(tokenizer)))
    wanted = expected(PAIRS, lambda *cut: plain(model, {"input_ids": open_turn(tokenizer, *cut)}))
    rows = count_passes(model)
    check(scorer.score(PAIRS), wanted)
    # Two responses for each pair, but for the response that the template trims.
    assert rows["rows"] <= 2 * len(PAIRS) + (template == "gemma")
    assert rows["passes"] == 1
    longest = max(len(open_turn(tokenizer, partial.pair.prompt, partial.pair.rejected, None)) for partial in PAIRS)
    assert longest > 2 * SLIDING_WINDOW


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", [Words(), Words(rejoin=True), Tokens(encoder_tokenizer())])
def test_units_that_are_not_the_models_tokens(family, unit):
    tokenizer = gemma_like_tokenizer(None)
    model = causal(family, tokenizer)

    def reward(prompt, response, length):
        cut = None if length is None else unit.prefix(response, length)
        return plain(model, {"input_ids": open_turn(tokenizer, prompt, response, cut)})

    scorer = PrefixScorer(model, PrefixReader.for_model(model, tokenizer, unit))
    check(scorer.score(PAIRS), expected(PAIRS, reward))


@pytest.mark.parametrize("format", [ChatTemplate, Dialogue])
def test_formats_that_close_every_partial_response(format):
    tokenizer = gemma_like_tokenizer()
    model = causal("gemma3", tokenizer)
    format = format(tokenizer) if format is ChatTemplate else format()

    def reward(prompt, response, length):
        cut = response if length is None else Words().prefix(response, length)
        (text,) = format.render(prompt, [cut])
        return plain(model, {"input_ids": tokenizer(text.removeprefix("<bos>"))["input_ids"]})

    scorer = PrefixScorer(model, PrefixReader.for_model(model, tokenizer, Words(), format))
    check(scorer.score(PAIRS), expected(PAIRS, reward))


@pytest.mark.parametrize("make", [small_encoder, bert])
@pytest.mark.parametrize("unit", [Words(), Tokens(encoder_tokenizer())])
def test_encoders_read_every_partial_response(make, unit):
    tokenizer = encoder_tokenizer()
    model = make(tokenizer)

    def reward(prompt, response, length):
        cut = response if length is None else unit.prefix(response, length)
        encoded = tokenizer([prompt], [cut])
        return plain(model, {name: encoded[name][0] for name in encoded})

    scorer = PrefixScorer(model, PrefixReader.for_model(model, tokenizer, unit), batch_tokens=400)
    check(scorer.score(PAIRS), expected(PAIRS, reward))


@pytest.mark.parametrize("kind", [*FAMILIES, "deberta"])
def test_rewards_do_not_depend_on_the_size_of_a_pass(kind):
    tokenizer = encoder_tokenizer() if kind == "deberta" else small_tokenizer()
    model = small_encoder(tokenizer) if kind == "deberta" else causal(kind, tokenizer)
    reader = PrefixReader.for_model(model, tokenizer, Words())
    inputs = [encoded for pair in PAIRS for encoded in reader.read(pair).inputs]
    alone = PrefixScorer(model, reader, batch_tokens=1).score(PAIRS)
    rows = count_passes(model)
    for batch_tokens, most in ((50, len(inputs)), (200, len(inputs) - 1), (100_000, 2)):
        scorer = PrefixScorer(model, reader, batch_tokens=batch_tokens)
        rows.clear()
        check(scorer.score(PAIRS), alone)
        assert rows["rows"] == len(inputs)
        assert rows["passes"] <= most
    for partial, own in zip(PAIRS, alone, strict=True):
        (single,) = PrefixScorer(model, reader).score([partial])
        check([single], [own])
    # The order of the pairs is theirs, not that of the passes.
    for order in itertools.islice(itertools.permutations(range(len(PAIRS))), 5, 20, 7):
        check(PrefixScorer(model, reader).score([PAIRS[row] for row in order]), [alone[row] for row in order])


@pytest.mark.parametrize("batch_tokens", [64, 150, 1000])
def test_a_pass_keeps_to_its_size(batch_tokens):
    tokenizer = small_tokenizer()
    model = causal("llama", tokenizer)
    reader = PrefixReader.for_model(model, tokenizer, Words(rejoin=True))
    scorer = PrefixScorer(model, reader, batch_tokens=batch_tokens)
    sizes = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: sizes.append(args[0].shape))
    scorer.score(PAIRS)
    assert all(rows == 1 or rows * width <= batch_tokens for rows, width in sizes)
    # No pass ends where its next input would have fitted.
    for (rows, width), _ in itertools.pairwise(sizes):
        assert (rows + 1) * width > batch_tokens


def test_large_passes_have_little_padding():
    tokenizer = encoder_tokenizer()
    model = small_encoder(tokenizer)
    reader = PrefixReader.for_model(model, tokenizer, Words())
    pair = PreferencePair(1, "a prompt", "the cat " * 60, "and then " * 60)
    scorer = PrefixScorer(model, reader)
    passes = []
    model.base_model.register_forward_hook(
        lambda _, args, options, output: passes.append(options["attention_mask"].double()), with_kwargs=True
    )
    (scored,) = scorer.score([PartialPair(pair, tuple(range(20, 121, 5)))])
    assert len(scored.chosen) == 21
    assert len(passes) > 2
    for mask in passes:
        if mask.numel() > 2048:
            assert mask.sum(1).min() >= 7 / 8 * mask.shape[1]


def test_what_both_responses_have_in_common_has_a_margin_of_exactly_zero():
    for tokenizer, make, unit in (
        (small_tokenizer(), lambda tokenizer: causal("gemma3", tokenizer), Tokens(small_tokenizer())),
        (small_tokenizer(), lambda tokenizer: causal("llama", tokenizer), Words()),
        (encoder_tokenizer(), small_encoder, Words()),
    ):
        model = make(tokenizer)
        pairs = [
            PartialPair(
                PreferencePair(
                    row, "who " * row, "the sea is here and" + " there" * row, "the sea is here or" + " er" * 9
                ),
                (1, 2, 3, 4, 5, None),
            )
            for row in range(1, 9)
        ]
        for scored in PrefixScorer(model, PrefixReader.for_model(model, tokenizer, unit), batch_tokens=150).score(
            pairs
        ):
            margins = [chosen - rejected for chosen, rejected in zip(scored.chosen, scored.rejected, strict=True)]
            assert margins[:4] == [0.0] * 4
            assert margins[5] != 0


@pytest.mark.parametrize("kind", ["llama", "deberta"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_weights_name_the_row_whose_reward_is_no_number(kind, value):
    tokenizer = encoder_tokenizer() if kind == "deberta" else small_tokenizer()
    model = small_encoder(tokenizer) if kind == "deberta" else causal(kind, tokenizer)
    with torch.no_grad():
        # A byte that only row 3 has.
        token = tokenizer("ö", add_special_tokens=False)["input_ids"][-1]
        model.get_input_embeddings().weight[token] = value
    scorer = PrefixScorer(model, PrefixReader.for_model(model, tokenizer, Words()))
    with pytest.raises(ValueError, match=r"row 3: the reward is (nan|inf|-inf); the model's weights are damaged"):
        scorer.score(PAIRS)
    others = [partial for partial in PAIRS if partial.pair.row != 3]
    assert [scored.row for scored in scorer.score(others)] == [1, 2, 4]


@pytest.mark.parametrize("kind", ["llama", "deberta"])
def test_infinite_rewards_are_refused(kind):
    tokenizer = encoder_tokenizer() if kind == "deberta" else small_tokenizer()
    model = small_encoder(tokenizer) if kind == "deberta" else causal(kind, tokenizer)
    with torch.no_grad():
        (model.classifier if kind == "deberta" else model.score).weight[0, 0] = torch.inf
    scorer = PrefixScorer(model, PrefixReader.for_model(model, tokenizer, Words()))
    with pytest.raises(ValueError, match=r"row 2: the reward is -?inf; the model's weights are damaged"):
        scorer.score(PAIRS[1:2])


def test_a_model_that_looks_ahead_is_refused():
    tokenizer = small_tokenizer()
    config = small_config("gemma3", vocabulary=len(tokenizer), num_labels=1, use_bidirectional_attention=True)
    model = AutoModelForSequenceClassification.from_config(config).train()
    reader = PrefixReader.for_model(model, tokenizer, Words())
    with pytest.raises(ValueError, match="cannot be read at every position: its rewards of the beginnings of a text"):
        PrefixScorer(model, reader)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_dtypes_are_read_as_exactly_as_they_compute(family, dtype):
    tokenizer = small_tokenizer()
    model = small_reward(family, seed=2, vocabulary=len(tokenizer), dtype=dtype)
    scorer = PrefixScorer(model, PrefixReader.for_model(model, tokenizer, Tokens(tokenizer)))
    wanted = expected(PAIRS, lambda *cut: plain(model, {"input_ids": open_turn(tokenizer, *cut)}))
    check(scorer.score(PAIRS), wanted, tolerance=3 * TOLERANCE[dtype])


def test_an_over_long_row_is_named_before_any_pass():
    tokenizer = small_tokenizer()
    model = causal("llama", tokenizer)
    scorer = PrefixScorer(model, PrefixReader.for_model(model, tokenizer, Words()))
    rows = count_passes(model)
    long = PartialPair(PreferencePair(77, "who", "er " * 600, "the"), (1, None))
    with pytest.raises(
        ValueError, match=r"row 77: prompt and response take .* tokens, but the model's context has 512"
    ):
        scorer.score([*PAIRS, long])
    assert not rows


def test_the_model_is_left_in_evaluation_mode_without_gradients():
    tokenizer = encoder_tokenizer()
    model = small_encoder(tokenizer, hidden_dropout_prob=0.5).train()
    scorer = PrefixScorer(model, PrefixReader.for_model(model, tokenizer, Words()))
    assert scorer.score(PAIRS[:1]) == scorer.score(PAIRS[:1])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_to_score_and_no_room():
    tokenizer = small_tokenizer()
    model = causal("llama", tokenizer)
    reader = PrefixReader.for_model(model, tokenizer, Words())
    scorer = PrefixScorer(model, reader)
    assert scorer.score([]) == []
    empty = PartialPair(PAIRS[0].pair, ())
    assert scorer.score([empty, PAIRS[1]])[0] == PairRewards(1, (), (), ())
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        PrefixScorer(model, reader, batch_tokens=0)


def test_inputs_are_padded_on_the_right_whatever_the_tokenizer_prefers():
    tokenizer = encoder_tokenizer()
    tokenizer.padding_side = "left"
    reader = PrefixReader(tokenizer, Words(), causal=False, format=Pair())
    inputs = reader.read(PartialPair(PAIRS[0].pair, (1, None))).inputs
    batch = pad_inputs(inputs, reader)
    for row, encoded in enumerate(inputs):
        length = len(encoded["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == encoded["input_ids"]
        assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
