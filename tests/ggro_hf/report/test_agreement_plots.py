"""Plots of agreement: what they show is what the rows hold."""

import pytest

from ggro_hf.evaluation import agreement_by_length
from ggro_hf.pairs import PairRewards

pytest.importorskip("matplotlib")

from matplotlib import image

from ggro_hf.report import agreement_plots
from ggro_hf.report.agreement_plots import draw_agreement


def rows(shift, lengths=(5, 10, 20, None), preferences=None):
    rewards = [
        PairRewards(
            row,
            lengths,
            tuple(shift + (row * 7 % 11) / 10 + place / 10 for place in range(len(lengths))),
            tuple((row * 5 % 13) / 10 for _ in lengths),
        )
        for row in range(1, 40)
    ]
    return agreement_by_length(rewards, preferences)


PREFERENCES = {(row, length): row % 3 - 1 for row in range(1, 40) for length in (5, 10, None)}


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """A function that draws and returns the figures by file name."""

    def draw(curves, **options):
        kept = {}
        monkeypatch.setattr(agreement_plots, "_save", lambda figure, path: kept.setdefault(path.name, figure) and path)
        draw_agreement(curves, tmp_path, **options)
        return kept

    return draw


def curve(panel, label):
    (line,) = (line for line in panel.get_lines() if line.get_label() == label)
    return list(zip(*map(list, line.get_data()), strict=True))


def finished(panel):
    """Means of the finished responses, as drawn."""
    return [container.lines[0].get_ydata()[0] for container in panel.containers]


def test_files_are_written(tmp_path):
    files = draw_agreement({"before": rows(0.0, preferences=PREFERENCES), "after": rows(0.4)}, tmp_path)
    assert [file.name for file in files] == ["agreement.png", "reward-gap.png", "consistency.png"]
    for file in files:
        pixels = image.imread(file)
        assert pixels.shape[0] > 300 and pixels.std() > 0.05


def test_one_model_is_not_compared(tmp_path):
    files = draw_agreement({"model": rows(0.0)}, tmp_path)
    assert [file.name for file in files] == ["agreement.png", "reward-gap.png"]


def test_a_panel_per_model_shows_its_rates(figures):
    curves = {"before": rows(0.0, preferences=PREFERENCES), "after": rows(0.4)}
    before, after = figures(curves, unit="word")["agreement.png"].axes
    assert (before.get_title(), after.get_title()) == ("before", "after")
    assert "[words]" in before.get_xlabel()
    five, ten, twenty, whole = curves["before"]
    assert curve(before, "AR_RM-SC") == [(row.length, row.rm_sc.mean) for row in (five, ten, twenty)]
    # Nobody judged length 20.
    assert curve(before, "AR_SC-HP") == [(row.length, row.sc_hp.mean) for row in (five, ten)]
    assert curve(before, "AR_RM-HP") == [(row.length, row.rm_hp.mean) for row in (five, ten)]
    assert finished(before) == [whole.rm_sc.mean, whole.sc_hp.mean, whole.rm_hp.mean]
    assert finished(after) == [curves["after"][-1].rm_sc.mean]
    band = before.collections[0].get_paths()[0].vertices
    for row in (five, ten, twenty):
        assert [row.length, row.rm_sc.low] in band.tolist() and [row.length, row.rm_sc.high] in band.tolist()


def test_models_are_compared_in_one_panel(figures):
    curves = {"before": rows(0.0), "after": rows(0.4), "ablation": rows(0.2, lengths=(5, 30))}
    drawn = figures(curves)
    for file, value in (("consistency.png", lambda row: row.rm_sc), ("reward-gap.png", lambda row: row.reward_gap)):
        (panel,) = drawn[file].axes
        for label, own in curves.items():
            assert curve(panel, label) == [(row.length, value(row).mean) for row in own if row.length is not None]
        assert finished(panel) == [value(curves[label][-1]).mean for label in ("before", "after")]
        assert "finished" in [label.get_text() for label in panel.get_xticklabels()]
        (legend,) = drawn[file].legends
        assert [text.get_text() for text in legend.get_texts()] == list(curves)


@pytest.mark.parametrize("lengths", [(None,), (1,), (1, 2)])
def test_few_lengths(figures, lengths):
    drawn = figures({"model": rows(0.0, lengths)})
    (panel,) = drawn["agreement.png"].axes
    drawn["agreement.png"].canvas.draw()
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels == ["finished" if length is None else str(length) for length in lengths]
    (legend,) = drawn["agreement.png"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["AR_RM-SC"]


def test_many_models_have_rows_of_panels(figures):
    drawn = figures({f"model {number}": rows(number / 10) for number in range(5)})
    assert [panel.get_title() for panel in drawn["agreement.png"].axes] == [f"model {number}" for number in range(5)]


@pytest.mark.parametrize(("curves", "message"), [({}, "curves is empty"), ({"m": []}, "'m' has no rows")])
def test_nothing_to_draw_is_named(tmp_path, curves, message):
    with pytest.raises(ValueError, match=message):
        draw_agreement(curves, tmp_path)


def test_a_missing_directory_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="missing"):
        draw_agreement({"model": rows(0.0)}, tmp_path / "missing")
