"""Judges: what replies count, what order cannot decide, and a file of verdicts that goes on after a kill."""

import errno
import json
import re
import resource

import pytest

from ggro_hf.evaluation import (
    ChatJudge,
    Judge,
    TextComparison,
    agreement_by_length,
    judge_preferences,
    preferences_from_rewards,
    read_preference_file,
)
from ggro_hf.evaluation.judges import judge_messages, parse_verdict
from ggro_hf.pairs import PairRewards, PartialPair, PreferencePair
from ggro_hf.training.units import Words

PAIRS = [
    PartialPair(PreferencePair(2, "Why?", "good because of {x}", "bad bad"), (1, 2, None)),
    PartialPair(PreferencePair(5, [{"role": "user", "content": "How?"}], "same good", "same bad"), (1, 2)),
]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('{"verdict": 1}', 1),
        ('{"verdict":2}', -1),
        ('{ "verdict" :  -1 }', 0),
        ('```json\n{\n  "verdict": 2\n}\n```', -1),
        ('A is clearer.\n\n{"verdict": 1} That is all.', 1),
        ('{"reason": "a {brace} and a \\" quote", "verdict": 2}', -1),
        ('{"verdict": 2, "scores": {"A": 1, "B": 2}}', -1),
        ('{"answer": {"verdict": 1}}', 1),
        ('Of {A, B} I take {"verdict": 1}, so {"verdict": 1}', 1),
        ('{"verdict": 1} or {"verdict": 2}', None),
        ('{"verdict": 1}, no: {"verdict": 3}', None),
        ('{"verdict": 0}', None),
        ('{"verdict": 3}', None),
        ('{"verdict": true}', None),
        ('{"verdict": null}', None),
        ('{"verdict": "A"}', None),
        ('{"verdict": [1]}', None),
        ('{"verdict": 1', None),
        ("verdict: 1", None),
        ("", None),
        ("{" * 5000, None),
        ('{"a":' * 5000, None),
    ],
)
def test_verdicts_of_replies(reply, verdict):
    assert parse_verdict(reply) == verdict


def shown(messages):
    """The answers of a question, as the model is shown them."""
    return re.search(r"<answer_a>\n(.*)\n</answer_a>\n\n<answer_b>\n(.*)\n</answer_b>", messages[1]["content"]).groups()


class Model:
    """A chat model that gives verdicts on A and B by a rule, and remembers what it was asked."""

    def __init__(self, verdict):
        self.verdict = verdict
        self.asked = []

    def __call__(self, messages):
        self.asked.append(shown(messages))
        return json.dumps({"verdict": self.verdict(*self.asked[-1])})


def goods(first, second):
    """More of "good" is better."""
    difference = first.count("good") - second.count("good")
    return 1 if difference > 0 else 2 if difference < 0 else -1


@pytest.mark.parametrize(
    ("first", "second", "preference"), [("good", "bad", 1), ("bad", "so good", -1), ("good {x}", "good", 0)]
)
def test_a_model_is_asked_in_both_orders(first, second, preference):
    model = Model(goods)
    assert ChatJudge(model).compare([TextComparison("Why?", first, second)]) == [preference]
    assert model.asked == [(first, second), (second, first)]


@pytest.mark.parametrize("verdict", [1, 2])
def test_a_model_that_likes_a_place_best_finds_ties(verdict):
    judge = ChatJudge(Model(lambda first, second: verdict))
    assert judge.compare([TextComparison("Why?", "good", "bad"), TextComparison("Why?", "bad", "good")]) == [0, 0]


def test_half_a_preference_is_a_tie():
    model = Model(lambda first, second: 1 if first == "good" else -1)
    assert ChatJudge(model).compare([TextComparison("Why?", "good", "bad")]) == [0]


@pytest.mark.parametrize("unreadable", ["good", "bad"])
def test_a_reply_without_a_verdict_in_either_order_is_unknown(unreadable):
    judge = ChatJudge(Model(lambda first, second: "?" if first == unreadable else goods(first, second)))
    assert judge.compare([TextComparison("Why?", "good", "bad")]) == [None]


def test_equal_responses_are_a_tie_without_a_question():
    model = Model(goods)
    assert ChatJudge(model).compare([TextComparison("Why?", "good", "good")]) == [0]
    assert not model.asked


def test_an_error_of_the_model_reaches_the_caller():
    def failing(messages):
        raise ConnectionError("no route")

    with pytest.raises(ConnectionError, match="no route"):
        ChatJudge(failing).compare([TextComparison("Why?", "good", "bad")])


def test_the_question_holds_all_turns_and_both_answers():
    prompt = [
        {"role": "system", "content": "Be {brief}."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    system, user = judge_messages(prompt, "{first}", "{second}")
    assert (system["role"], user["role"]) == ("system", "user")
    turns = "[system]\nBe {brief}.\n\n[user]\nHi\n\n[assistant]\nHello\n\n[user]\nBye"
    assert f"<conversation>\n{turns}\n</conversation>" in user["content"]
    assert shown([system, user]) == ("{first}", "{second}")
    assert "[user]\nWhy?" in judge_messages("Why?", "", "")[1]["content"]


def test_preferences_of_a_reward_model_make_it_agree_with_itself():
    rewards = [PairRewards(1, (1, None), (0.0, 2.0), (0.0, 1.0)), PairRewards(2, (1,), (-1.0,), (0.5,))]
    preferences = preferences_from_rewards(rewards)
    assert preferences == {(1, 1): 0, (1, None): 1, (2, 1): -1}
    assert [row.rm_hp.mean for row in agreement_by_length(rewards, preferences)] == [1.0, 1.0]


class Asked(Judge):
    """Another judge, by a rule; it stops working after some comparisons."""

    def __init__(self, lasts=10**6):
        self.model = Model(goods)
        self.lasts = lasts
        self.comparisons = []

    def compare(self, comparisons):
        if len(self.comparisons) + len(comparisons) > self.lasts:
            raise ConnectionError("no route")
        self.comparisons += comparisons
        return ChatJudge(self.model).compare(comparisons)


EXPECTED = {(2, 1): 1, (2, 2): 1, (2, None): 1, (5, 1): 0, (5, 2): 1}


def ask(judge, path, partials=PAIRS, unit=None, **options):
    return judge_preferences(judge, partials, unit or Words(), path, progress=False, **options)


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_every_comparison_is_judged_and_kept(tmp_path, batch):
    path, judge = tmp_path / "verdicts.jsonl", Asked()
    assert ask(judge, path, batch=batch) == EXPECTED
    texts = [(comparison.first, comparison.second) for comparison in judge.comparisons]
    assert texts[:3] == [("good", "bad"), ("good because", "bad bad"), ("good because of {x}", "bad bad")]
    assert judge.comparisons[4].prompt == PAIRS[1].pair.prompt
    assert read_preference_file(path) == EXPECTED
    # All of it is there, so nobody is asked again.
    assert ask(Asked(lasts=0), path) == EXPECTED


def test_verdicts_survive_a_judge_that_fails(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    with pytest.raises(ConnectionError):
        ask(Asked(lasts=3), path)
    assert len(read_preference_file(path)) == 3
    judge = Asked()
    assert ask(judge, path) == EXPECTED
    assert len(judge.comparisons) == 2


def test_a_kill_within_a_line_costs_that_verdict_alone(tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "verdicts.jsonl"
    ask(Asked(), whole)
    content = whole.read_bytes()
    boundaries = [place for place, byte in enumerate(content) if byte == ord("\n")]
    for end in {*range(0, len(content), 9), *boundaries, *(place + 1 for place in boundaries[:-1])}:
        path.write_bytes(content[:end])
        judge = Asked()
        assert ask(judge, path) == EXPECTED
        assert path.read_bytes() == content
        # A line of which only the newline is missing is complete.
        assert len(judge.comparisons) == len(EXPECTED) - content[: end + 1].count(b"\n")


def test_unread_verdicts_are_kept_and_not_asked_again(tmp_path):
    class Silent(Judge):
        def compare(self, comparisons):
            return [None for _ in comparisons]

    path = tmp_path / "verdicts.jsonl"
    unknown = dict.fromkeys(EXPECTED)
    assert ask(Silent(), path) == unknown
    assert ask(Asked(lasts=0), path) == unknown == read_preference_file(path)


def test_a_full_disk_is_named_and_a_later_run_goes_on(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(OSError, match="run again to go on") as caught:
            ask(Asked(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.stat().st_size == 200
    judge = Asked()
    assert ask(judge, path) == EXPECTED == read_preference_file(path)
    assert 0 < len(judge.comparisons) < len(EXPECTED)


def test_verdicts_of_people_are_taken_and_completed(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    # Without a newline at its end, as editors leave it.
    path.write_text('\n{"row":5,"length":2,"preference":-1,"who":"me"}\n{"row": 9, "length": 2, "preference": 0}')
    assert ask(Asked(), path) == {**EXPECTED, (5, 2): -1}
    assert read_preference_file(path) == {**EXPECTED, (5, 2): -1, (9, 2): 0}


@pytest.mark.parametrize(
    "pair",
    [PreferencePair(2, "Why?", "good", "worse"), PreferencePair(2, "Who?", "good", "bad")],
    ids=["text", "prompt"],
)
def test_verdicts_on_other_texts_are_refused(tmp_path, pair):
    path = tmp_path / "verdicts.jsonl"
    ask(Asked(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="row 2, length 1 is a verdict on other texts"):
        ask(Asked(), path, [PartialPair(pair, (1,))])
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"somebody's notes", b"notes\n", b'{"line": 1}', b'{"row": 1, "length": 1}'])
def test_another_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "verdicts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="line 1"):
        ask(Asked(), path)
    assert path.read_bytes() == content


def test_two_runs_do_not_write_to_one_file(tmp_path):
    path = tmp_path / "verdicts.jsonl"

    class Second(Judge):
        def compare(self, comparisons):
            ask(Asked(), path)

    with pytest.raises(ValueError, match="written by another run"):
        ask(Second(), path)


@pytest.mark.parametrize(("answers", "message"), [([], "0 verdicts for 1"), ([2], "2, but"), ([True], "True, but")])
def test_a_judge_that_breaks_its_word_is_named(tmp_path, answers, message):
    class Broken(Judge):
        def compare(self, comparisons):
            return answers

    with pytest.raises(ValueError, match=f"Broken.compare returned {message}"):
        ask(Broken(), tmp_path / "verdicts.jsonl")


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="row 2 comes twice"):
        ask(Asked(), tmp_path / "verdicts.jsonl", [PAIRS[0], PAIRS[0]])
    with pytest.raises(ValueError, match="batch is 0"):
        ask(Asked(), tmp_path / "verdicts.jsonl", batch=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"row": 1, "length": 2}', "no field 'preference'"),
        ('{"length": 2, "preference": 1}', "no field 'row'"),
        ('{"row": 0, "length": 2, "preference": 1}', "row is 0"),
        ('{"row": "1", "length": 2, "preference": 1}', 'row is "1"'),
        ('{"row": true, "length": 2, "preference": 1}', "row is true"),
        ('{"row": 1, "length": 0, "preference": 1}', "length is 0"),
        ('{"row": 1, "length": 2.0, "preference": 1}', "length is 2.0"),
        ('{"row": 1, "length": 2, "preference": 2}', "preference is 2"),
        ('{"row": 1, "length": 2, "preference": "1"}', 'preference is "1"'),
        ('{"row": 1, "length": 2, "preference": true}', "preference is true"),
        ('{"row": 3, "length": null, "preference": 1}', "row 3, length None is on line 1 already"),
        ("[1]", "holds a list"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "people.jsonl"
    path.write_text('{"row": 3, "length": null, "preference": null}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_preference_file(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "people.jsonl"
    path.write_bytes(b'{"row": 3, "who": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        read_preference_file(path)
