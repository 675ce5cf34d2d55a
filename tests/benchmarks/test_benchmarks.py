"""The benchmark suite: its registry, a tiny run, its gate, its comparison, and README's table. Nothing about time."""

import csv
import subprocess
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import base, ceilings, conftest, gate, memory, report
from benchmarks.contest import FEWEST_ROUNDS, Contest, Contests
from benchmarks.readme import BEGIN, END, committed_reports, with_table
from benchmarks.registry import OURS, Case, Provider, load_cases, load_small_cases
from benchmarks.session import ROOT, SessionError, collect_timings
from ggro_hf.report.benchmarks import BenchmarkReport, Ceiling

CASES = load_cases()
SMALL = load_small_cases()


def add_case(providers=None, **options):
    """A case that takes no time."""
    providers = providers or (Provider(OURS, torch.add), Provider("other", torch.sub))
    inputs = {"input": torch.ones(2), "other": torch.ones(2)}
    return Case("add", "2", {"size": 2}, torch.float32, 24, 2, lambda: inputs, providers, **options)


@pytest.fixture
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# The registry


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_every_op_has_a_quick_a_shown_and_a_baseline_case(op):
    cases = load_cases([op])
    assert {case.op for case in cases} == {op}
    assert any(case.quick for case in cases) and any(case.shown for case in cases)
    for case in cases:
        names = [provider.name for provider in case.providers]
        assert names[0] == OURS and len(set(names)) == len(names) >= 2
        assert case.bytes > 0 and case.flops > 0


@pytest.mark.parametrize("op", sorted(SMALL))
def test_all_providers_compute_the_same(op, keep_threads):
    case = SMALL[op]
    torch.manual_seed(0)
    inputs = case.inputs()
    expected = tensors(next(provider for provider in case.providers if provider.name == OURS).bind(inputs)())
    for provider in case.providers:
        # Compilation takes seconds, and its result is torch's affair.
        if not provider.part and not provider.compiled:
            actual = tensors(provider.bind(inputs)())
            assert len(actual) == len(expected)
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def tensors(result):
    """The tensors of a result, whatever holds them."""
    return [result] if isinstance(result, torch.Tensor) else [part for parts in result for part in tensors(parts)]


def test_an_unknown_op_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"unknown op 'topk', the registry has .*entropy_topk"):
        load_cases(["entropy_topk", "topk"])


def test_an_unavailable_provider_is_left_out():
    case = add_case((Provider(OURS, torch.add), Provider("library", torch.add, available=lambda: False)))
    assert [provider.name for provider in case.available_providers()] == [OURS]


def test_what_a_provider_prepares_is_made_once_outside_the_call():
    prepared = []

    def prepare(input, other):
        prepared.append(input + other)
        return {"input": prepared[0]}

    call = Provider("prepared", torch.neg, prepare=prepare).bind({"input": torch.ones(2), "other": torch.ones(2)})
    assert call().tolist() == call().tolist() == [-2, -2]
    assert len(prepared) == 1


# Turns


class Collected:
    """As much of pytest.Metafunc as the suite uses."""

    def __init__(self, **options):
        defaults = {"op": None, "threads": [1, 2], "rounds": 3, "quick": True, "only_ours": False}
        self.config = type("Config", (), {"option": type("Option", (), defaults | options)})

    def parametrize(self, name, parameters):
        assert name == "turn"
        self.turns = [parameter.values[0] for parameter in parameters]
        self.timers = [mark.kwargs["timer"].__name__ for parameter in parameters for mark in parameter.marks]


def test_providers_take_turns_within_a_case_and_number_of_threads():
    collected = Collected(op=["entropy_topk"])
    conftest.pytest_generate_tests(collected)
    contests = [list(turns) for _, turns in groupby(collected.turns, key=lambda turn: (turn.case.name, turn.threads))]
    assert len(contests) == 2 * len({turn.case.name for turn in collected.turns})
    for turns in contests:
        names = [provider.name for provider in turns[0].case.available_providers()]
        assert [(turn.round, turn.provider.name) for turn in turns] == [(i, name) for i in range(3) for name in names]
    for turn, timer in zip(collected.turns, collected.timers, strict=True):
        assert timer == ("process_time" if turn.threads == 1 else "perf_counter")


def test_only_ours_leaves_baselines_and_ceilings_out():
    collected = Collected(only_ours=True)
    conftest.pytest_generate_tests(collected)
    assert {turn.provider.name for turn in collected.turns} == {OURS}
    assert {turn.case.op for turn in collected.turns} == {case.op for case in CASES}


def test_a_contest_without_time_left_ends_with_a_whole_round(keep_threads):
    contest = Contest(add_case(), 1, {"input": torch.ones(2), "other": torch.ones(2)}, seconds=0.0)
    assert [contest.plays(round_) for round_ in (0, FEWEST_ROUNDS - 1, FEWEST_ROUNDS)] == [True, True, False]
    timings, calls = contest.turn(OURS)
    assert timings >= 1 and calls > 1


def test_inputs_are_made_once_per_case(keep_threads, capsys):
    made = []
    case = add_case()
    case = replace(case, inputs=lambda: made.append(1) or {"input": torch.ones(2), "other": torch.ones(2)})
    contests = Contests(total=3, seconds=0.0)
    for threads in (1, 1, 2):
        contests.enter(case, threads).times[OURS].append(1e-6)
    contests.enter(replace(case, label="3"), 1)
    contests.close()
    assert len(made) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "[1/3] add[2, float32], 1 thread: ggro 1.0 us",
        "[2/3] add[2, float32], 2 threads: ggro 1.0 us",
    ]


# The run


def test_a_quick_run_writes_json_and_csv(tmp_path):
    pytest.importorskip("pytest_benchmark")
    arguments = ["--quick", "--op", "candidate_scores", "--threads", "1", "--output", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "gather + einsum" in result.stdout
    results = BenchmarkReport.load(tmp_path / "kernels.json")
    (case,) = [case for case in load_cases(["candidate_scores"]) if case.quick]
    assert [row.provider for row in results.rows] == [provider.name for provider in case.available_providers()]
    for row in results.rows:
        assert row.p20_us <= row.median_us <= row.p80_us
        assert (row.ratio is None) == (row.provider == OURS)
        assert row.gb_per_s == pytest.approx(case.bytes / row.median_us / 1e3, rel=1e-3)
    assert results.ceiling(1).matmul_gflop_per_s.keys() == {"float32", "bfloat16"}
    with (tmp_path / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == [row.provider for row in results.rows]
    assert {row["torch"] for row in rows} == {torch.__version__}


def test_red_kernel_tests_stop_the_run(tmp_path, monkeypatch, capfd):
    (tmp_path / "test_red.py").write_text("def test_red():\n    assert False\n")
    require_green_tests = gate.require_green_tests
    monkeypatch.setattr(gate, "require_green_tests", lambda: require_green_tests(tmp_path))
    monkeypatch.setattr(command.session, "run", lambda settings: pytest.fail("measured in spite of red tests"))
    assert command.main(["--op", "entropy_topk"]) == 1
    assert "while the kernel tests are red" in capfd.readouterr().err


def test_a_wrong_command_line_says_what_is_wrong(capsys):
    for arguments, message in (
        (["--op", "nothing"], "unknown op 'nothing'"),
        (["--base", "HEAD", "--memory"], "leave --output and --memory out"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert message in capsys.readouterr().err


def test_timings_of_all_turns_come_together():
    def turn(provider, *data):
        return {"extra_info": {"case": "c", "threads": 1, "provider": provider}, "stats": {"data": list(data)}}

    assert collect_timings([turn("a", 1.0), turn("b", 2.0), turn("a", 3.0)]) == {
        ("c", 1, "a"): [1.0, 3.0],
        ("c", 1, "b"): [2.0],
    }


def test_rows_carry_medians_ratios_and_bandwidth():
    half = Provider("half", torch.neg, part=True)
    case = add_case((Provider(OURS, torch.add), Provider("other", torch.sub), half))
    ceiling = Ceiling(1, read_gb_per_s=24.0, matmul_gflop_per_s={"float32": 100.0})
    timings = {(case.name, 1, OURS): [1e-9, 2e-9, 3e-9], (case.name, 1, "other"): [5e-9, 8e-9, 6e-9]}
    timings[case.name, 1, "half"] = [1e-9]
    ours, other, part = report.case_rows(case, ceiling, timings, {(case.name, "other"): 7})
    assert (ours.median_us, other.median_us, other.ratio) == (2e-3, 6e-3, 3.0)
    assert (ours.gb_per_s, ours.bandwidth_percent, ours.gflop_per_s) == (12.0, 50.0, 1.0)
    assert (part.ratio, part.gb_per_s, part.bandwidth_percent, part.gflop_per_s) == (0.5, None, None, None)
    assert (ours.peak_extra_bytes, other.peak_extra_bytes) == (None, 7)
    assert report.case_rows(case, replace(ceiling, threads=2), timings, {}) == []


def test_ceilings_are_read_from_their_cases():
    seconds = {ceilings.READ: 0.01, ceilings.MATMUL: 0.1}
    timings = {(case.name, 1, "torch"): [seconds[case.op]] for case in ceilings.CASES}
    ceiling = report.measured_ceiling(timings, 1)
    assert ceiling.read_gb_per_s == pytest.approx(2**28 / 1e7)
    assert ceiling.matmul_gflop_per_s == pytest.approx(dict.fromkeys(("float32", "bfloat16"), 2 * 2048**3 / 1e8))


# Memory


def test_memory_sees_what_a_call_needs_and_nothing_more():
    size = 1 << 24

    def inputs():
        return {"input": torch.ones(size)}

    copying = Provider("copying", lambda input: (input + 1).sum())
    reading = Provider("reading", torch.sum)
    case = replace(add_case((copying, reading)), inputs=inputs)
    # Growth is that of the whole process: other tests' threads may add a little.
    assert memory.measure_growth(case, "copying") == pytest.approx(4 * size, rel=0.1)
    assert memory.measure_growth(case, "reading") < 0.1 * 4 * size


# The comparison with another commit


def git(*arguments, cwd):
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose build copies a file into ggro_kernels, as ours does with the extension."""
    root = tmp_path / "repository"
    (root / "ggro_kernels").mkdir(parents=True)
    (root / "ggro_kernels" / "__init__.py").write_text("old = True\n")
    (root / "setup.py").write_text("open('ggro_kernels/_native.so', 'w').close()\n")
    git("init", "-q", cwd=root)
    git("add", ".", cwd=root)
    git("commit", "-q", "-m", "old", cwd=root)
    (root / "ggro_kernels" / "__init__.py").write_text("old = False\n")
    monkeypatch.setattr(base, "ROOT", root)
    return root


def worktrees(root):
    result = subprocess.run(["git", "worktree", "list"], cwd=root, check=True, capture_output=True, text=True)
    return result.stdout.splitlines()


def test_the_other_commit_is_built_apart_and_removed(repository):
    with base.kernels_of("HEAD") as kernels:
        assert [path.name for path in kernels.iterdir()] == ["ggro_kernels"]
        assert (kernels / "ggro_kernels" / "__init__.py").read_text() == "old = True\n"
        assert (kernels / "ggro_kernels" / "_native.so").exists()
    assert not kernels.exists()
    assert len(worktrees(repository)) == 1
    assert (repository / "ggro_kernels" / "__init__.py").read_text() == "old = False\n"


def test_a_build_that_fails_leaves_no_worktree(repository):
    (repository / "setup.py").write_text("raise SystemExit('no compiler')\n")
    git("commit", "-q", "-am", "broken", cwd=repository)
    with pytest.raises(SessionError, match="no compiler"), base.kernels_of("HEAD"):
        pass
    assert len(worktrees(repository)) == 1


def test_an_unknown_commit_is_an_error(repository):
    with pytest.raises(SessionError, match="nowhere"), base.kernels_of("nowhere"):
        pass


def test_the_comparison_shows_ratios_and_new_cases():
    key, new = ("case", 1, OURS), ("another case", 2, OURS)
    lines = base.format_comparison("v1", {key: [3e-6, 2e-6, 4e-6]}, {key: [1.5e-6], new: [1e-6]}).splitlines()
    assert lines[-2].split() == ["case", "1", "3.0", "us", "1.5", "us", "2.00x"]
    assert lines[-1].split() == ["another", "case", "2", "new", "1.0", "us"]


# README


def test_readme_shows_the_committed_results():
    readme = Path(ROOT, "README.md").read_text(encoding="utf-8")
    reports = committed_reports()
    assert reports
    assert with_table(readme, reports) == readme, "README.md differs from benchmarks/results: run `make readme-table`"


@pytest.mark.parametrize("text", ["no markers", f"{END}\n{BEGIN}\n", f"{BEGIN}\n"])
def test_a_readme_without_its_markers_is_refused(text):
    with pytest.raises(ValueError, match="put them back"):
        with_table(text, [])
