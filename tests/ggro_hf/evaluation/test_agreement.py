"""Agreement rates by hand and against a plain loop over the definitions."""

import json
import math
import random

import pytest

from ggro_hf.evaluation import agreement_by_length, agreement_records, format_agreement
from ggro_hf.pairs import PairRewards

# Gaps at length 2: 1, 0, -3; at length 5: 2 (row 1 alone); finished: 0.5, 0.5.
REWARDS = [
    PairRewards(1, (2, 5, None), (1.0, 3.0, 1.0), (0.0, 1.0, 0.5)),
    PairRewards(4, (2, None), (2.0, 1.0), (2.0, 0.5)),
    PairRewards(7, (2,), (-1.0,), (2.0,)),
]


def test_rates_by_hand():
    two, five, finished = agreement_by_length(REWARDS)
    assert [row.length for row in (two, five, finished)] == [2, 5, None]
    assert [row.pairs for row in (two, five, finished)] == [3, 1, 2]
    assert two.rm_sc.mean == pytest.approx(1 / 3)
    assert two.reward_gap.mean == pytest.approx(4 / 3)
    assert (five.rm_sc.mean, five.reward_gap.mean) == (1.0, 2.0)
    assert (finished.rm_sc.mean, finished.reward_gap.mean) == (1.0, 0.5)
    assert (finished.reward_gap.low, finished.reward_gap.high) == (0.5, 0.5)
    for row in (two, five, finished):
        assert (row.preferences, row.unparsed, row.sc_hp, row.rm_hp) == (0, 0, None, None)


@pytest.mark.parametrize(
    ("gap", "preference", "rm_sc", "sc_hp", "rm_hp"),
    [
        (1.0, 1, 1, 1, 1),
        (1.0, 0, 1, 0, 0),
        (1.0, -1, 1, 0, 0),
        (0.0, 1, 0, 1, 0),
        (0.0, 0, 0, 0, 1),
        (0.0, -1, 0, 0, 0),
        (-1.0, 1, 0, 1, 0),
        (-1.0, 0, 0, 0, 0),
        (-1.0, -1, 0, 0, 1),
    ],
)
def test_ties_agree_with_ties_alone(gap, preference, rm_sc, sc_hp, rm_hp):
    (row,) = agreement_by_length([PairRewards(3, (4,), (gap,), (0.0,))], {(3, 4): preference})
    assert (row.rm_sc.mean, row.sc_hp.mean, row.rm_hp.mean) == (rm_sc, sc_hp, rm_hp)


def test_rates_with_preferences_are_over_the_pairs_that_have_one():
    preferences = {(1, 2): 1, (4, 2): None, (7, 2): 1, (9, 2): -1, (1, 5): None, (7, None): 1}
    two, five, finished = agreement_by_length(REWARDS, preferences)
    assert (two.pairs, two.preferences, two.unparsed) == (3, 2, 1)
    assert (two.sc_hp.mean, two.rm_hp.mean) == (1.0, 0.5)
    assert (five.preferences, five.unparsed, five.sc_hp) == (0, 1, None)
    assert (finished.preferences, finished.unparsed, finished.rm_hp) == (0, 0, None)


def test_rates_are_those_of_a_loop_over_the_definitions():
    choices = random.Random(0)
    rewards, preferences = [], {}
    for row in range(1, 201):
        lengths = (*sorted(choices.sample(range(1, 6), 3)), None)
        scores = [tuple(choices.choice((-1.0, 0.0, 0.5)) for _ in lengths) for _ in range(2)]
        rewards.append(PairRewards(row, lengths, *scores))
        preferences |= {(row, length): choices.choice((-1, 0, 1)) for length in lengths if choices.random() < 0.7}
    for row in agreement_by_length(rewards, preferences):
        compared = [
            (pair.chosen[index], pair.rejected[index], preferences.get((pair.row, length)))
            for pair in rewards
            for index, length in enumerate(pair.lengths)
            if length == row.length
        ]
        judged = [entry for entry in compared if entry[2] is not None]
        assert row.pairs == len(compared)
        assert row.preferences == len(judged)
        assert row.rm_sc.mean == pytest.approx(sum(first > second for first, second, _ in compared) / len(compared))
        assert row.reward_gap.mean == pytest.approx(
            sum(abs(first - second) for first, second, _ in compared) / len(compared)
        )
        assert row.sc_hp.mean == pytest.approx(sum(h > 0 for *_, h in judged) / len(judged))
        same = [(r > s) == (h > 0) and (r < s) == (h < 0) for r, s, h in judged]
        assert row.rm_hp.mean == pytest.approx(sum(same) / len(same))


def test_the_interval_of_a_rate_is_that_of_the_binomial():
    rewards = [PairRewards(row, (1,), (float(row % 10 < 6),), (0.5,)) for row in range(1000)]
    (row,) = agreement_by_length(rewards)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 1000)
    assert row.rm_sc.mean == 0.6
    assert row.rm_sc.low == pytest.approx(0.6 - half, abs=0.1 * half)
    assert row.rm_sc.high == pytest.approx(0.6 + half, abs=0.1 * half)


def test_a_length_that_was_drawn_twice_counts_once():
    once, twice = PairRewards(1, (3,), (1.0,), (0.0,)), PairRewards(1, (3, 3), (1.0, 1.0), (0.0, 0.0))
    other = PairRewards(2, (3,), (0.0,), (1.0,))
    assert agreement_by_length([twice, other]) == agreement_by_length([once, other])


@pytest.mark.parametrize(
    ("rewards", "preferences", "message"),
    [
        ([], None, "no comparison"),
        ([PairRewards(1, (), (), ())], None, "no comparison"),
        ([REWARDS[0], REWARDS[0]], None, "row 1 comes twice"),
        ([PairRewards(8, (1, 2), (0.0,), (0.0, 1.0))], None, "row 8 has 2 lengths, 1 rewards"),
        ([PairRewards(8, (1,), (math.nan,), (0.0,))], None, "row 8, length 1 has the rewards nan"),
        ([PairRewards(8, (None,), (0.0,), (math.inf,))], None, "row 8, length None has the rewards 0.0 and inf"),
        (REWARDS, {(1, 2): 2}, "row 1, length 2 is 2"),
        (REWARDS, {(2, 2): 1, (1, 3): 1}, "2 entries, but none for a row"),
    ],
)
def test_bad_input_is_named(rewards, preferences, message):
    with pytest.raises(ValueError, match=message):
        agreement_by_length(rewards, preferences)


def test_the_table_has_a_line_per_length_and_model():
    curves = {"before": agreement_by_length(REWARDS), "after": agreement_by_length(REWARDS[:1], {(1, 5): -1})}
    lines = format_agreement(curves).splitlines()
    assert len(lines) == 1 + 3 + 3
    assert [line.split()[:2] for line in lines[1:]] == [
        [length, label] for length in ("2", "5", "finished") for label in ("before", "after")
    ]
    assert "AR_RM-SC %" in lines[0] and "AR_RM-HP %" in lines[0]
    # Length 5, after: one pair, agreeing, and judged the other way round.
    assert " ".join(lines[4].split()) == "5 after 1 100.0 [100.0, 100.0] 1 0 0.0 [0.0, 0.0] 0.0 [0.0, 0.0] 2 [2, 2]"
    # Every column ends where its name does.
    end = lines[0].index("AR_RM-SC %") + len("AR_RM-SC %")
    assert all(line[end - 1] == "]" for line in lines[1:])


def test_a_table_without_preferences_has_no_columns_for_them():
    assert "HP" not in format_agreement({"model": agreement_by_length(REWARDS)})


def test_records_are_json():
    curves = {"before": agreement_by_length(REWARDS, {(1, 2): 1})}
    records = json.loads(json.dumps(agreement_records(curves), allow_nan=False))
    assert [record["length"] for record in records] == [2, 5, None]
    assert records[0]["model"] == "before"
    assert records[0]["sc_hp_ci95"] == [1.0, 1.0]
    assert records[1]["sc_hp_mean"] is None and records[1]["sc_hp_ci95"] is None
    assert records[1]["reward_gap_mean"] == 2.0
