"""The benchmark of gold reward against speed, on few tokens."""

import json

import pytest
import torch

from benchmarks import pareto
from ggro_hf.results import Candidate, Segment


@pytest.fixture(autouse=True)
def threads():
    """Those of the other tests again, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_run_writes_figures_and_a_plot(tmp_path, monkeypatch, capsys):
    figures, plot = tmp_path / "pareto.json", tmp_path / "pareto.svg"
    options = ["--prompts", "2", "--new-tokens", "6", "--rounds", "1", "--json", str(figures), "--plot", str(plot)]
    monkeypatch.setattr("sys.argv", ["pareto", *options, "--method", "greedy", "exhaustive", "pruned, 2 by gradient"])
    pareto.main()
    (result,) = json.loads(figures.read_text())["results"]
    rows = {row["method"]: row for row in result["methods"]}
    assert list(rows) == ["greedy", "exhaustive", "pruned, 2 by gradient"]
    assert rows["exhaustive"]["reward"] > rows["greedy"]["reward"]
    assert all(row["gold_ci95"][0] <= row["gold"] <= row["gold_ci95"][1] for row in rows.values())
    assert rows["exhaustive"]["reward_backward_tokens"] == 0 < rows["pruned, 2 by gradient"]["reward_backward_tokens"]
    assert {row["ranking"] for row in result["rankings"]} == {"gradient", "policy"}
    for ranking in ("gradient", "policy"):
        shares = [row["share_of_gain"] for row in result["rankings"] if row["ranking"] == ranking]
        assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    assert plot.read_text().count("tokens per second") == 1
    assert "exhaustive" in capsys.readouterr().out


def test_candidates_are_ranked_by_the_gradient_and_by_the_policy():
    base = Candidate((7,), (1.0,), 0.0, False, proposals=(7, 8, 9), proposal_scores=(0.0, -1.0, 2.0))
    others = (Candidate((8,), (1.0,), 3.0, False, (8,)), Candidate((9,), (1.0,), 4.0, False, (9,)))
    segment = Segment(5, 0, (base, *others), 2)
    assert pareto._by_policy(segment) == [3.0, 4.0]
    assert pareto._by_gradient(segment) == [4.0, 3.0]


def test_every_method_belongs_to_a_family_of_the_plot():
    assert {
        name.partition(",")[0]
        for name in pareto.decoders(pareto.RewardModel.from_pretrained(pareto.demo_models.REWARD))
    } == set(pareto.FAMILIES)
