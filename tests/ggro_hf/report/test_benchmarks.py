"""Results files of the kernel benchmarks, and `ggro bench`."""

import sys

import pytest

from ggro_hf.cli import main
from ggro_hf.report.benchmarks import (
    COLD,
    GRAPH,
    BenchmarkReport,
    BenchmarkRow,
    Ceiling,
    baseline_ratios,
    microseconds,
    share_of_ceiling,
    times,
)

CEILINGS = [
    Ceiling(threads, 25.0 * threads, {"float32": 100.0 * threads, "bfloat16": 200.0 * threads}) for threads in (1, 2)
]


def row(op="entropy_topk", provider="ggro", threads=1, median=100.0, **changes):
    fields = {
        "op": op,
        "case": "4 x 128256",
        "shape": {"rows": 4, "vocabulary": 128256},
        "dtype": "float32",
        "threads": threads,
        "provider": provider,
        "timings": 15,
        "median_us": median,
        "p20_us": 0.9 * median,
        "p80_us": 1.1 * median,
        "ratio": None if provider == "ggro" else median / 100.0,
        "bytes": 1_000_000,
        "flops": 2_000_000,
        "gb_per_s": 1e3 / median,
        "bandwidth_percent": 4e3 / median,
        "gflop_per_s": 2e3 / median,
        "peak_extra_bytes": None,
        "part": False,
        "shown": True,
    }
    return BenchmarkRow(**fields | changes)


@pytest.fixture
def report():
    rows = [row(threads=1), row(threads=1, provider="eager", median=1234.0)]
    rows += [row(threads=2), row(threads=2, provider="eager", median=97.0)]
    rows += [row("project_topk", flops=10**9), row("project_topk", provider="mm + topk", median=5000.0, flops=10**9)]
    rows.append(row("project_topk", "half", median=40.0, part=True, gflop_per_s=None))
    return BenchmarkReport(
        machine={"kind": "cpu-test", "cpu": "A processor", "cores": 2, "isa": "avx2"},
        versions={"ggro": "0.1.0", "torch": "2.13.0", "triton": None, "python": "3.11"},
        commit="0123456789ab",
        ceilings=CEILINGS,
        rows=rows,
    )


@pytest.fixture
def results(report, tmp_path):
    path = tmp_path / "kernels.json"
    report.save(path)
    return path


def test_a_report_survives_its_file(report, results):
    assert BenchmarkReport.load(results) == report


@pytest.mark.parametrize("value, text", [(0.5, "0.50 us"), (51.2, "51.2 us"), (2460.0, "2.46 ms"), (3.2e6, "3.20 s")])
def test_times_have_three_digits(value, text):
    assert microseconds(value) == text


def test_ratios_have_three_digits():
    assert [times(ratio) for ratio in (0.974, 12.84, 99.96, 655.9)] == ["0.97x", "12.8x", "100x", "656x"]


def test_parts_count_together():
    contest = [row(), row(provider="eager", median=300.0), row(provider="forward", median=80.0, part=True)]
    contest.append(row(provider="op", median=15.0, part=True))
    ratios = baseline_ratios({row.provider: row for row in contest})
    assert ratios == pytest.approx({"eager": 3.0, "sum of parts": 0.95})


def test_the_ceiling_is_the_one_that_binds():
    # 1 MB at 25 GB/s are 40 us; 1 GFLOP at 100 GFLOP/s are 10 ms, in bf16 half of that.
    assert share_of_ceiling(row(median=80.0), CEILINGS[0]) == "50 %"
    assert share_of_ceiling(row(median=20_000.0, flops=10**9), CEILINGS[0]) == "50 % (matmul)"
    assert share_of_ceiling(row(median=20_000.0, flops=10**9, dtype="bfloat16"), CEILINGS[0]) == "25 % (matmul)"


def test_bench_prints_a_line_per_case_and_number_of_threads(results, capsys):
    assert main(["bench", str(results)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["entropy_topk"] in lines and ["project_topk"] in lines
    (line,) = [line for line in lines if "12.3x" in line]
    assert line[:6] == ["4", "x", "128256", "float32", "1", "100"]
    assert [line for line in lines if "0.97x" in line]


def test_bench_shows_memory_where_it_was_measured(report, results, capsys):
    rows = [row(peak_extra_bytes=400_000), row(provider="eager", median=500.0, peak_extra_bytes=131_000_000)]
    BenchmarkReport(report.machine, report.versions, report.commit, CEILINGS, rows).save(results)
    assert main(["bench", str(results)]) == 0
    printed = capsys.readouterr().out
    assert "extra memory: ggro / eager" in printed and "0.4 MB / 131 MB" in printed


def test_bench_draws_speedups_and_rooflines(results, tmp_path):
    pytest.importorskip("matplotlib")
    plots = tmp_path / "new" / "plots"
    assert main(["bench", str(results), "--plot", str(plots)]) == 0
    names = {"speedup-entropy_topk.png", "speedup-project_topk.png", "roofline-1.png", "roofline-2.png"}
    assert {path.name for path in plots.iterdir()} == names
    for path in plots.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def gpu_results(tmp_path):
    rows = [row(threads=None, mode=COLD), row(threads=None, mode=COLD, provider="eager", median=1234.0)]
    rows += [row(threads=None, mode=GRAPH), row(threads=None, mode=GRAPH, provider="eager", median=97.0)]
    machine = {
        "kind": "h100",
        "cpu": "A processor",
        "cores": 2,
        "isa": None,
        "gpu": "H100",
        "gpu_gib": 80.0,
        "l2_mib": 50.0,
    }
    limits = [Ceiling(None, None, {"float32": 50_000.0, "bfloat16": 800_000.0}, copy_gb_per_s=3000.0)]
    report = BenchmarkReport(machine, {"torch": "2.11.0"}, "0123456789ab", limits, rows, ["x[1]: no time left"])
    report.save(tmp_path / "kernels.json")
    assert BenchmarkReport.load(tmp_path / "kernels.json") == report
    return tmp_path / "kernels.json"


def test_bench_shows_a_gpu(gpu_results, capsys):
    assert main(["bench", str(gpu_results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "H100, 80.0 GiB, 50 MiB of L2; torch 2.11.0; commit 0123456789ab",
        "NOT MEASURED: x[1]: no time left",
        "ceilings: copy 3000.0 GB/s; GFLOP/s float32 50000, bfloat16 800000",
    ]
    assert [" ".join(line.split()[:8]) for line in lines[-2:]] == [
        "4 x 128256 float32 cold L2 100 us",
        "4 x 128256 float32 graph 100 us 90.0",
    ]


def test_bench_draws_a_gpu(gpu_results, tmp_path):
    pytest.importorskip("matplotlib")
    plots = tmp_path / "plots"
    assert main(["bench", str(gpu_results), "--plot", str(plots)]) == 0
    assert {path.name for path in plots.iterdir()} == {"speedup-entropy_topk.png", "roofline-gpu.png"}


def test_plots_without_matplotlib_name_the_extra(results, tmp_path, monkeypatch, capsys):
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "ggro_hf.report.benchmark_plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", str(results), "--plot", str(tmp_path)]) == 2
    assert "pip install 'ggro-kernels[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [1], "ceilings": []}'])
def test_another_file_is_refused(text, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(text)
    assert main(["bench", str(path)]) == 2
    assert "is not a results file" in capsys.readouterr().err


def test_a_missing_file_is_refused(tmp_path, capsys):
    assert main(["bench", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_plots_that_cannot_be_written_are_an_error(results, capsys):
    assert main(["bench", str(results), "--plot", str(results / "inside")]) == 2
    assert "cannot be written" in capsys.readouterr().err
