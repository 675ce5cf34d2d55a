"""The benchmark of guided search: a run on small models, what it counts, and what it refuses."""

import json

import pytest
import torch

from benchmarks import guided_search, pairs
from benchmarks.guided_search import SEARCHES, Decoded, counted, format_rows, runs_of, speeds_of, work_of
from benchmarks.pairs import Pair, respond
from ggro_hf import ARGS, RewardModel
from tests.ggro_hf.small_models import small_policy, small_reward, small_tokenizer

VOCABULARY = 276
PROMPT = [5, 9, 33, 7, 12, 40, 41]
NEW_TOKENS = 12


@pytest.fixture(autouse=True)
def short_responses(monkeypatch):
    for module in (guided_search, pairs):
        monkeypatch.setattr(module, "NEW_TOKENS", NEW_TOKENS)


@pytest.fixture(scope="module")
def pair():
    policy = small_policy(seed=0, vocabulary=VOCABULARY, gain=2.0, dtype=torch.float32)
    policy.generation_config.eos_token_id = None
    reward = RewardModel(small_reward(seed=1, vocabulary=VOCABULARY, dtype=torch.float32))
    return Pair(policy, reward, small_tokenizer(), PROMPT, 3.0)


@pytest.fixture
def small_run(pair, monkeypatch):
    """The command on the small models, and its threads undone."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(guided_search, "build", lambda vocabulary, prompt_tokens: pair)
    yield lambda *arguments: guided_search.main(["--vocabulary", "276", *arguments])
    torch.set_num_threads(threads)


def test_a_run_of_everything_prints_a_table_and_writes_what_it_measured(small_run, tmp_path, capsys):
    output = tmp_path / "search.json"
    assert small_run("--threads", "1", "--rounds", "1", "--json", str(output)) == 0
    results = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert [result["search"] for result in results] == list(SEARCHES)
    printed = capsys.readouterr().out
    for result in results:
        baseline, *_, ours = result["runs"].values()
        assert len(result["runs"]) >= 2
        for name, run in result["runs"].items():
            assert name in printed
            assert run["tokens_per_second"] > 0
            assert run["policy_tokens"] >= len(PROMPT) + NEW_TOKENS - 1 <= run["reward_tokens"] + NEW_TOKENS
        assert ours["reward_tokens"] < baseline["reward_tokens"]
        assert ours["policy_tokens"] <= baseline["policy_tokens"] or "candidates" in ours
        assert ("candidates" in ours) == (result["search"] in ("CARDS", "rejection sampling"))


def test_the_work_of_args(pair):
    works = work_of(runs_of("ARGS", pair), pair)
    prompt, steps = len(PROMPT), NEW_TOKENS
    for name in ("ARGS, released, 30 copies", "ARGS, released, 5 copies"):
        assert works[name].policy_tokens == prompt + steps - 1
        assert works[name].reward_tokens == 30 * (prompt + 1) + 30 * (steps - 1)
    assert works["ARGS"].policy_tokens == prompt + steps - 1
    assert works["ARGS"].reward_tokens == prompt + 30 * steps
    of_thirty, of_five, ours = (work.reward_cache_bytes for work in works.values())
    # Two layers of keys and values, two heads of 8 floats; our buffers have room for 256 tokens at least.
    assert of_thirty == 6 * of_five == 30 * (prompt + steps) * 2 * 2 * 2 * 8 * 4
    assert ours == 256 * 2 * 2 * 2 * 8 * 4


def test_hooks_count_what_counters_do(pair):
    respond(ARGS(pair.reward), pair.policy, pair.prompt)
    with counted(pair) as work:
        counters = respond(ARGS(pair.reward), pair.policy, pair.prompt).counters
    assert (work.policy_tokens, work.reward_tokens) == (counters.policy_tokens, counters.reward_forward_tokens)
    with counted(pair) as work:
        pass
    respond(ARGS(pair.reward), pair.policy, pair.prompt)
    assert work.policy_tokens == 0


def test_args_that_differ_are_an_error():
    runs = {"released": lambda: Decoded([1, 2, 3]), "ours": lambda: Decoded([1, 2, 4])}
    with pytest.raises(AssertionError, match="tokens differ"):
        speeds_of("ARGS", runs, 1)
    assert set(speeds_of("CBS", runs, 1)) == set(runs)


def test_ratios_are_against_the_first():
    row = {"policy_tokens": 1, "reward_tokens": 2, "reward_cache_bytes": 3_000_000}
    rows = {
        "first": row | {"tokens_per_second": 2.0, "candidates": 8, "candidates_per_second": 4.0},
        "ours": row
        | {"tokens_per_second": 5.0, "candidates": 6, "candidates_per_second": 6.0, "peak_bytes": 7_000_000},
    }
    *_, ours = format_rows("title", rows).splitlines()
    assert ours.split() == ["ours", "5.00", "2.50", "1", "2", "3.0", "7", "6", "6.00", "1.50"]


def test_the_peak_of_one_way(small_run, capsys):
    assert small_run("--search", "ARGS", "--peak-of", "ARGS, released, 30 copies") == 0
    assert int(capsys.readouterr().out) >= 0


def test_unknown_names(pair, small_run, capsys):
    with pytest.raises(ValueError, match="search is 'ARG', but must be one of ARGS, CBS"):
        runs_of("ARG", pair)
    with pytest.raises(SystemExit):
        small_run("--search", "nothing")
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
