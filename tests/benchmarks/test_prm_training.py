"""The benchmark of a training step on partial responses: a run on small models, its check, and what it counts."""

import json

import pytest
import torch

from benchmarks import prm_training
from benchmarks.baselines import partial_rows
from benchmarks.prm_training import OURS, Subject, Way, counted, ways_of, work_of
from ggro_hf.pairs import PartialPair, PreferencePair
from ggro_hf.training.weights import WeighedPair
from tests.ggro_hf.small_models import small_tokenizer
from tests.ggro_hf.training.preference_data import causal_classifier, encoder_classifier

PROMPT, CHOSEN, REJECTED = "the cat", " in a stone and then", " again"


def subject(*, causal=True):
    tokenizer = small_tokenizer()
    model = causal_classifier() if causal else encoder_classifier(tokenizer)
    # Single letters: their tokens never merge with others.
    # In fp64, where the bounds can be tight; Llama normalises in fp32 all the same.
    return Subject(prm_training._for_training(model.double()), tokenizer, ["x", "z", "q", "j"])


def pair(*lengths):
    return WeighedPair(
        PartialPair(PreferencePair(1, PROMPT, CHOSEN, REJECTED), lengths), tuple(1.5 + i for i in range(len(lengths)))
    )


@pytest.fixture(autouse=True)
def tight_bounds(monkeypatch):
    monkeypatch.setattr(prm_training, "LOSS_BOUND", 1e-6)
    monkeypatch.setattr(prm_training, "GRADIENT_BOUND", 1e-6)


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", ["sst", "scoring", "encoder", "encoder-sst"])
def test_both_sides_compute_the_same_from_the_tokens_that_they_should(case, monkeypatch, tmp_path):
    lengths = (1, 2, 4) if case in ("scoring", "encoder") else (1, 2, 4, None)
    monkeypatch.setattr(prm_training, "pairs_of", lambda case, subject: [pair(*lengths), pair(*lengths)])
    own = subject(causal=not case.startswith("encoder"))
    works = work_of(ways_of(case, own, str(tmp_path)), own.model)

    def tokens(text):
        return len(own.tokenizer(text, add_special_tokens=False)["input_ids"])

    # The finished response ends with a token that a causal model reads.
    ends = {**dict.fromkeys((1, 2, 4), 0), None: int(own.causal)}
    rows = {
        (text, length): tokens(PROMPT) + min(tokens(text), length or 99) + ends[length]
        for text in (CHOSEN, REJECTED)
        for length in lengths
    }
    for name in ("a row each", "a row each, by length"):
        assert works[name]["unpadded"] == 2 * sum(rows.values()) <= works[name]["tokens"]
        assert set(works[name]["apart"]) == ({"reward"} if case in ("scoring", "encoder") else {"loss", "gradient"})
    if own.causal:
        longest = [max(count for (text, _), count in rows.items() if text == own) for own in (CHOSEN, REJECTED)]
        assert works[OURS]["unpadded"] == 2 * sum(longest)
        assert works[OURS]["tokens"] == 4 * max(longest)
    else:
        assert works[OURS]["unpadded"] <= works["a row each"]["unpadded"]


def test_a_wrong_loss_and_a_wrong_gradient_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(prm_training, "pairs_of", lambda case, subject: [pair(1, 2, None)])
    own = subject()
    ways = ways_of("sst", own, str(tmp_path))

    def shifted():
        return 1.001 * ways[OURS].run()

    def bent():
        loss = ways[OURS].run()
        own.model.score.weight.grad[0, 0] += 1e-2
        return loss

    with pytest.raises(AssertionError, match="loss"):
        work_of(ways | {OURS: Way(shifted, 1)}, own.model)
    with pytest.raises(AssertionError, match="gradient"):
        work_of(ways | {OURS: Way(bent, 1)}, own.model)


def test_the_baseline_is_padded_by_batches_of_eight_rows():
    own = subject()
    comparisons = partial_rows.comparisons_of([pair(1, 2, 3, 4, None)], own.tokenizer, causal=True)
    ordered = partial_rows.by_length(comparisons)
    assert [comparison.length for comparison in ordered] == sorted(comparison.length for comparison in comparisons)
    assert sorted(comparison.place for comparison in partial_rows.shuffled(comparisons)) == list(range(5))
    with counted(own.model) as passes:
        partial_rows.train(own.model, own.tokenizer, ordered)
    assert passes == [8 * ordered[3].length, 2 * ordered[4].length]


def test_a_run_prints_a_table_and_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prm_training, "build", lambda model, causal: subject(causal=causal))
    output = tmp_path / "training.json"
    cases = ["tlt", "encoder"]
    arguments = ["--case", *cases, "--model", "512", "--threads", "1", "--rounds", "1", "--json", str(output)]
    assert prm_training.main(arguments) == 0
    results = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert [result["case"] for result in results] == cases
    printed = capsys.readouterr().out
    assert printed.count("target 20x") == 2
    for result in results:
        assert len(result["runs"]) == 3
        for name, run in result["runs"].items():
            assert name in printed
            assert run["seconds"] > 0
        ours, plain = (result["runs"][name]["unpadded"] for name in (OURS, "a row each"))
        assert ours < plain if not result["case"].startswith("encoder") else ours <= plain
    (tlt,) = (result["runs"] for result in results if result["case"] == "tlt")
    # 64 tokens of prompt; every length from 1 to 100 of two responses.
    assert tlt["a row each"]["unpadded"] == 2 * sum(64 + length for length in range(1, 101))
    assert tlt[OURS]["tokens"] == 2 * 164
