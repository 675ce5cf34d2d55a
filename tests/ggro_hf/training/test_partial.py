"""At which lengths pairs are compared: the ranges and laws of both methods, and that only seed and row matter."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ggro_hf.pairs import PartialPair, PreferencePair
from ggro_hf.training.data_statistics import NO_COMPARISON, format_statistics, statistics
from ggro_hf.training.partial import PartialRecipe, make_partial, response_lengths
from ggro_hf.training.partial_file import read_partial, write_partial
from ggro_hf.training.preferences import Selection, read_preferences
from ggro_hf.training.prefix_reader import PrefixReader
from ggro_hf.training.scoring import PrefixScorer
from ggro_hf.training.selection import select
from ggro_hf.training.units import Tokens, Words
from tests.ggro_hf.small_models import small_reward, small_tokenizer

RECIPES = st.builds(
    PartialRecipe,
    method=st.sampled_from(["sst", "tlt"]),
    segments=st.integers(1, 6),
    draws=st.sampled_from(["code", "paper"]),
    replace=st.booleans(),
    min_length=st.integers(1, 4),
    include_full=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)


def pair_of(row: int, chosen: int = 3, rejected: int = 2) -> PreferencePair:
    return PreferencePair(row, "Why?", " ".join(["a"] * chosen), " ".join(["b"] * rejected))


@settings(max_examples=300, deadline=None)
@given(RECIPES, st.integers(1, 10**6), st.integers(0, 40))
def test_lengths_are_ascending_within_range_and_as_many_as_wanted(
    recipe: PartialRecipe, row: int, longest: int
) -> None:
    lengths = recipe.lengths(pair_of(row), longest)
    assert (lengths[-1:] == (None,)) == recipe.include_full
    partial = [length for length in lengths if length is not None]
    assert len(partial) == len(lengths) - recipe.include_full
    assert partial == sorted(partial)
    assert all(type(length) is int and recipe.min_length <= length <= longest for length in partial)
    possible = max(longest - recipe.min_length + 1, 0)
    if recipe.method == "tlt":
        assert partial == list(range(recipe.min_length, longest + 1))
        return
    assert recipe.replace or len(set(partial)) == len(partial)
    assert len(partial) <= 2 * recipe.segments
    if recipe.draws == "code":
        assert bool(partial) == (possible >= 1 and longest >= 2)


def test_laws_of_the_draws() -> None:
    rows = range(1, 4001)
    for draws, numbers in (("code", range(1, 11)), ("paper", range(11))):
        recipe = PartialRecipe(draws=draws, include_full=False, seed=3)
        counted = Counter(len(recipe.lengths(pair_of(row), 1000)) for row in rows)
        assert_uniform(counted, numbers)
    for replaced in (False, True):
        recipe = PartialRecipe(replace=replaced, include_full=False, min_length=2, seed=4)
        lengths = Counter(length for row in rows for length in recipe.lengths(pair_of(row), 25))
        assert_uniform(lengths, range(2, 26))
    repeated = PartialRecipe(replace=True, include_full=False, segments=20)
    assert any(len(set(lengths)) < len(lengths) for lengths in (repeated.lengths(pair_of(row), 9) for row in range(9)))


def assert_uniform(counted: Counter, values: range) -> None:
    """All values come, and by Pearson's test as often as one another (a chance of 1e-4 to fail, were it not seeded)."""
    assert counted.keys() == set(values)
    expected = counted.total() / len(values)
    statistic = sum((counted[value] - expected) ** 2 for value in values) / expected
    freedom = len(values) - 1
    # Wilson and Hilferty's approximation of the quantile.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * np.sqrt(2 / (9 * freedom))) ** 3


def test_numbers_that_other_numpy_versions_must_repeat() -> None:
    """Lengths are part of a data set's fingerprint: another stream would orphan the rewards computed for it."""
    recipe = PartialRecipe(seed=7)
    assert [recipe.lengths(pair_of(row), 100) for row in (1, 2)] == [
        (34, 36, 42, 51, 71, None),
        (18, 19, 26, 37, 51, 60, 64, 79, 85, 96, None),
    ]
    assert [pair.row for pair in replace(recipe, fraction=0.3).take([pair_of(row) for row in range(1, 21)])] == [
        5,
        7,
        10,
        13,
        15,
        18,
    ]


def as_released_lengths(words: int, generator: random.Random) -> list[int]:
    """Word counts of the partial responses as the specification describes the released code."""
    number = generator.randint(1, 10)
    ends = range(1, words)
    positions = list(ends) if words <= number else generator.sample(ends, number)
    return [position + 1 for position in positions]


@pytest.mark.parametrize("words", [1, 2, 3, 8, 30])
def test_as_released_has_the_released_law(words: int) -> None:
    recipe = PartialRecipe.as_released()
    generator = random.Random(0)
    ours = [recipe.lengths(pair_of(row), words) for row in range(1, 3001)]
    theirs = [(*sorted(as_released_lengths(words, generator)), None) for _ in ours]
    for statistic in (len, lambda lengths: lengths[0], lambda lengths: lengths[len(lengths) // 2]):
        mine, other = (Counter(map(statistic, drawn)) for drawn in (ours, theirs))
        assert mine.keys() <= set(range(2, words + 1)) | set(range(12)) | {None}
        for value in mine | other:
            # Five standard deviations of the difference of two shares of 3000.
            assert abs(mine[value] - other[value]) < 5 * np.sqrt(mine[value] + other[value]) + 1
    tokenizer = small_tokenizer()
    unit = recipe.make_unit(tokenizer)
    assert isinstance(unit, Words) and unit.prefix("a\n\n b c", 2) == "a b" and unit.prefix("a\n\n b", 2) == "a\n\n b"


def selection_of(count: int, **options: Any) -> Selection:
    generator = np.random.default_rng(0)
    pairs = [pair_of(row, *map(int, generator.integers(1, 20, 2))) for row in range(1, count + 1)]
    return Selection(pairs, {}, **options)


@pytest.mark.parametrize("recipe", [PartialRecipe(unit="word"), PartialRecipe(unit="word", method="tlt")])
def test_a_pair_depends_on_seed_and_row_alone(recipe: PartialRecipe) -> None:
    whole = selection_of(60)
    partials = make_partial(whole, recipe, Words())
    assert make_partial(whole, recipe, Words()) == partials
    turned = make_partial(Selection(whole.pairs[::-1], {}), recipe, Words())
    assert turned == partials[::-1]
    some = make_partial(Selection(whole.pairs[5::7], {}), recipe, Words())
    assert some == partials[5::7]
    fewer = make_partial(whole, replace(recipe, fraction=0.5), Words())
    assert 15 < len(fewer) < 45
    assert all(partial in partials for partial in fewer)
    limited = make_partial(whole, replace(recipe, fraction=0.5, limit=10), Words())
    assert len(limited) == 10 and all(partial in fewer for partial in limited)
    assert [partial.pair.row for partial in limited] == sorted(partial.pair.row for partial in limited)
    other = make_partial(whole, replace(recipe, seed=1), Words())
    assert (other == partials) == (recipe.method == "tlt")
    assert recipe.take(whole.pairs) == whole.pairs


def test_longest_is_that_of_the_longer_response_in_the_unit() -> None:
    tokenizer = small_tokenizer()
    recipe = PartialRecipe(method="tlt", include_full=False)
    pairs = [PreferencePair(1, "p", "the and", "thé"), PreferencePair(2, "p", "a", "b\n\n c d ")]
    for unit, counts in ((Tokens(tokenizer), [4, 8]), (Words(), [2, 3])):
        own = replace(recipe, unit=unit.name)
        lengths = [partial.lengths for partial in make_partial(Selection(pairs, {}), own, unit)]
        longest = [max(unit.count(pair.chosen), unit.count(pair.rejected)) for pair in pairs]
        assert lengths == [tuple(range(1, count + 1)) for count in longest]
        assert longest == counts


def test_lengths_in_batches_are_those_one_by_one() -> None:
    tokens = Tokens(small_tokenizer())
    texts = [f"the {'é' * (row % 7)} and {row}" for row in range(2100)]
    assert response_lengths(tokens, texts) == [tokens.count(text) for text in texts]
    assert response_lengths(tokens, []) == []


def test_cut_pairs_are_never_compared_finished() -> None:
    whole = selection_of(8)
    recipe = PartialRecipe(unit="word", method="tlt")
    partials = make_partial(replace(whole, cut=frozenset({2, 5})), recipe, Words())
    for partial, plain in zip(partials, make_partial(whole, recipe, Words()), strict=True):
        if partial.pair.row in (2, 5):
            assert partial == PartialPair(plain.pair, plain.lengths[:-1])
        else:
            assert partial == plain


def test_refused() -> None:
    for wrong, message in [
        ({"method": "all"}, "method is 'all'; wanted 'sst' or 'tlt'"),
        ({"unit": "words"}, "unit is 'words'; wanted 'token' or 'word'"),
        ({"draws": "both"}, "draws is 'both'"),
        ({"segments": 0}, "segments is 0, but must be at least 1"),
        ({"min_length": 0}, "min_length is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"fraction": 0.0}, "fraction is 0.0, but must be above 0"),
        ({"fraction": float("nan")}, "fraction is nan"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"rejoin_words": True}, "rejoin_words is for words, but unit is 'token'; set unit='word'"),
    ]:
        with pytest.raises(ValueError, match=message):
            PartialRecipe(**wrong)
    with pytest.raises(ValueError, match="unit counts words, rejoined, but the recipe has unit='word', rejoin_words=F"):
        make_partial(selection_of(2), PartialRecipe(unit="word"), Words(rejoin=True))
    with pytest.raises(ValueError, match="unit counts words, but the recipe has unit='token'"):
        make_partial(selection_of(2), PartialRecipe(), Words())
    with pytest.raises(ValueError, match="no comparison is left of 2 pairs, of which 2 were taken"):
        make_partial(selection_of(2), PartialRecipe(unit="word", min_length=50, include_full=False), Words())
    with pytest.raises(ValueError, match="no comparison is left of 3 pairs, of which 0 were taken"):
        make_partial(selection_of(3), PartialRecipe(unit="word", fraction=1e-6), Words())


def test_statistics() -> None:
    pairs = [pair_of(1, 4, 2), pair_of(3, 1, 1), pair_of(4, 10, 6), pair_of(6, 7, 1)]
    selection = Selection(pairs, {"identical responses": [2, 5], "over-long": [7]}, frozenset({3, 4}))
    recipe = PartialRecipe(method="tlt", unit="word", min_length=2)
    partials = make_partial(selection, recipe, Words())
    counts = statistics(selection, recipe, partials, Words())
    assert counts == {
        "rows": 7,
        "kept": 3,
        "cut": 1,
        "not_taken": 0,
        "dropped": {"identical responses": [2, 5], "over-long": [7], NO_COMPARISON: [3]},
        "unit": "word",
        # Lengths 2 to 4 and finished, 2 to 10, 2 to 7 and finished.
        "comparisons": 4 + 9 + 7,
        "finished_comparisons": 2,
        "comparisons_per_pair": pytest.approx({"min": 4, "median": 7, "mean": 20 / 3, "p95": 8.8, "max": 9}),
        "chosen_length": pytest.approx({"min": 4, "median": 7, "mean": 7, "p95": 9.7, "max": 10}),
        "rejected_length": pytest.approx({"min": 1, "median": 2, "mean": 3, "p95": 5.6, "max": 6}),
    }
    assert format_statistics(counts).splitlines() == [
        "rows read                            7",
        "pairs kept                           3, 1 of them cut",
        "  left out: identical responses      2 (row 2, 5)",
        "  left out: over-long                1 (row 7)",
        "  left out: no length to compare at  1 (row 3)",
        "comparisons                          20, 2 of finished responses",
        "",
        "                           min  median  mean  p95  max",
        "comparisons per pair         4       7   6.7  8.8    9",
        "chosen responses, words      4       7     7  9.7   10",
        "rejected responses, words    1       2     3  5.6    6",
    ]
    assert json.loads(json.dumps(counts)) == counts


def test_statistics_of_a_share() -> None:
    selection = selection_of(40)
    recipe = PartialRecipe(unit="word", fraction=0.5, limit=7)
    counts = statistics(selection, recipe, make_partial(selection, recipe, Words()), Words())
    assert (counts["rows"], counts["kept"], counts["not_taken"], counts["dropped"]) == (40, 7, 33, {})
    assert "  left out by fraction or limit  33" in format_statistics(counts).splitlines()


@pytest.mark.parametrize(
    "recipe", [PartialRecipe(segments=2), PartialRecipe.as_released(), PartialRecipe(method="tlt")]
)
def test_from_a_file_to_rewards(tmp_path: Path, recipe: PartialRecipe) -> None:
    tokenizer = small_tokenizer()
    # No token spans a line break, so that texts can be put together.
    tokenizer.chat_template = (
        "{% for m in messages %}<|begin_of_text|>{{ m.role + '\\n' + m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|begin_of_text|>{{ 'assistant\\n' }}{% endif %}"
    )
    model = small_reward(seed=0, vocabulary=len(tokenizer), max_position_embeddings=64)
    reader = PrefixReader.for_model(model, tokenizer, recipe.make_unit(tokenizer))
    question = "\n\nHuman: Why\n\nso?\n\nAssistant:"
    answers = [("the end of an era", "no"), ("the " * 40, "a b c d"), ("", "b"), ("in the\n\n  rain", "in é 😀 sand")]
    lines = [json.dumps({"chosen": f"{question} {one}", "rejected": f"{question} {other}"}) for one, other in answers]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))

    selection = select(read_preferences(tmp_path / "pairs.jsonl"), reader, overlong="cut")
    assert selection.cut == {2} and selection.dropped == {"empty response": [3]}
    write_partial(tmp_path / "partial.jsonl", make_partial(selection, recipe, reader.unit))
    partials = read_partial(tmp_path / "partial.jsonl")
    rewards = PrefixScorer(model, reader).score(partials)
    assert [own.row for own in rewards] == [1, 2, 4]
    assert [own.lengths[-1] is None for own in rewards] == [True, False, True]
    # The longest inputs as a plain call of the model reads them.
    for pair, own in zip(selection.pairs, rewards, strict=True):
        for response, reward in ((pair.chosen, own.chosen[-1]), (pair.rejected, own.rejected[-1])):
            if own.lengths[-1] is None:
                messages = [*pair.prompt, {"role": "assistant", "content": response}]
                text = tokenizer.apply_chat_template(messages, tokenize=False)
            else:
                text = tokenizer.apply_chat_template(pair.prompt, tokenize=False, add_generation_prompt=True)
                text += recipe.make_unit(tokenizer).prefix(response, own.lengths[-1])
            with torch.no_grad():
                expected = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item()
            assert reward == pytest.approx(expected, abs=1e-9)
