"""The suite for GPUs, run on the CPU: only `CudaDevice` itself is left out. Nothing about time."""

import csv
from dataclasses import replace

import pytest
import torch

import ggro_kernels
from benchmarks import __main__ as command
from benchmarks import ceilings, registry, report, targets
from benchmarks.gpu import session
from benchmarks.gpu.contest import Contest, DeviceLost, Entrant, first_line
from benchmarks.gpu.session import GpuSession, Settings, by_importance
from benchmarks.readme import markdown, with_table
from benchmarks.registry import OURS, TRITON, Case, Provider, load_cases, load_small_cases, on_gpu, ours
from benchmarks.session import SessionError
from ggro_hf.report.benchmarks import COLD, GRAPH, MODES, WARM, BenchmarkReport, format_report
from tests.benchmarks import host
from tests.benchmarks.host import HostDevice, LostDevice

CASES = load_cases(gpu=True)
QUICKLY = {"seconds": 0.0, "rounds": 1}


def add_case(*providers, size=24):
    inputs = {"input": torch.ones(2), "other": torch.ones(2)}
    return Case("add", "2", {"size": 2}, torch.float32, size, 2, lambda: inputs, providers)


def fail(**inputs):
    raise RuntimeError("\n  out of memory  \nand more")


# The registry


def test_names_are_unique():
    names = [case.name for case in ceilings.GPU_CASES + CASES]
    assert len(set(names)) == len(names)


def test_every_op_of_the_package_has_a_quick_and_a_shown_case():
    ops = {case.op for case in CASES}
    assert ops == {case.op for case in load_cases()} - {"batch_invariant_linear", "interleaved_forward"}
    for op in ops:
        cases = load_cases([op], gpu=True)
        assert sum(case.quick for case in cases) == 1
        assert any(case.shown for case in cases)
        for case in cases:
            names = [provider.name for provider in case.providers]
            assert names[0] == OURS and len(set(names)) == len(names) >= 2
            assert case.bytes > 0 and case.flops > 0


def test_the_most_important_cases_come_first():
    cases = by_importance(Settings())
    assert cases[: len(ceilings.GPU_CASES)] == ceilings.GPU_CASES
    cases = cases[len(ceilings.GPU_CASES) :]
    assert sorted(case.name for case in cases) == sorted(case.name for case in CASES)
    quick = [case.quick for case in cases]
    assert quick == sorted(quick, reverse=True)
    shown = [case.shown for case in cases if not case.quick]
    assert shown == sorted(shown, reverse=True)
    assert {case.op for case in by_importance(Settings(ops=["entropy_topk"], quick=True))} == {
        "entropy_topk",
        ceilings.COPY,
        ceilings.MATMUL,
    }


def test_ours_are_the_kernels_of_a_gpu_asked_for_by_name(monkeypatch):
    asked = []

    def kernel(impl, **inputs):
        asked.append((impl, inputs))

    monkeypatch.setattr(ggro_kernels, "entropy_topk", kernel)
    case = on_gpu(replace(CASES[0], op="entropy_topk", providers=(ours("entropy_topk"), Provider("other", torch.add))))
    providers = {provider.name: provider for provider in case.providers}
    assert list(providers) == [OURS, TRITON, "other"]
    for runs, expected in ((True, [OURS, TRITON, "other"]), (False, [OURS, "other"])):
        monkeypatch.setattr(registry, "runs_cuda_kernels", lambda op, runs=runs: runs)
        assert [provider.name for provider in case.available_providers()] == expected
        providers[OURS].bind({"k": 3})()
    providers[TRITON].bind({"k": 3})()
    assert asked == [("native", {"k": 3}), ("triton", {"k": 3}), ("triton", {"k": 3})]
    wrapped = ours("entropy_topk", lambda function: lambda **inputs: function(wrapped=True, **inputs))
    on_gpu(replace(case, providers=(wrapped,))).providers[0].bind({})()
    assert asked[-1] == ("triton", {"wrapped": True})


def test_cuda_kernels_run_where_the_op_has_them_and_the_gpu_takes_them(monkeypatch):
    assert not registry.runs_cuda_kernels("entropy_topk") or torch.cuda.is_available()
    monkeypatch.setattr("ggro_kernels.dispatch.cuda_error", lambda: None)
    assert registry.runs_cuda_kernels("entropy_topk")
    assert not registry.runs_cuda_kernels("weighted_bt_loss")
    monkeypatch.setattr("ggro_kernels.dispatch.cuda_error", lambda: "there is no driver")
    assert not registry.runs_cuda_kernels("entropy_topk")


def test_a_library_that_is_not_there_is_left_out():
    for case in CASES:
        named = [provider for provider in case.providers if provider.name.startswith("flashinfer")]
        assert bool(named) == (case.op in ("entropy_topk", "prefix_attention"))
        for provider in named:
            try:
                import flashinfer  # noqa: F401
            except ImportError:
                assert provider not in case.available_providers()


def test_the_layout_for_flashinfer_is_that_of_the_tree():
    case = load_small_cases()["prefix_attention"]
    inputs = case.inputs()
    from benchmarks.ops import prefix_attention as module

    taken = module.FLASHINFER.prepare(**inputs)
    tree = {name: taken[name].transpose(0, 1)[None] for name in ("query", "key", "value")}
    theirs = module.sdpa_gqa(**tree, mask=taken["mask"][None, None])
    torch.testing.assert_close(theirs, case.providers[0].bind(inputs)(), rtol=1e-4, atol=1e-4)


# A contest


def test_what_fits_the_cache_is_also_timed_warm_and_in_a_graph():
    case = add_case(Provider(OURS, torch.add), Provider("other", torch.sub))
    measured = Contest(case, HostDevice()).run(**QUICKLY)
    assert measured.timings.keys() == {(mode, name) for mode in MODES for name in (OURS, "other")}
    assert all(len(times) == 5 and min(times) >= 0 for times in measured.timings.values())
    assert measured.extra_bytes == {OURS: 7, "other": 7}
    assert not measured.failures
    large = replace(case, bytes=HostDevice.cache_bytes + 1)
    assert Contest(large, HostDevice()).run(**QUICKLY).timings.keys() == {(COLD, OURS), (COLD, "other")}


def test_providers_take_turns():
    order = []
    providers = [Provider(name, lambda name=name, **_: order.append(name)) for name in (OURS, "other")]
    Contest(add_case(*providers, size=1 << 30), HostDevice()).run(seconds=0.0, rounds=3)
    # Before the rounds every provider is warmed up by itself.
    assert order[-30:][::5] == [OURS, "other"] * 3


def test_the_clock_starts_behind_enough_work_to_hide_the_launch():
    events = []

    class Recording(HostDevice):
        def mark(self):
            events.append("mark")
            return super().mark()

        def flush(self):
            events.append("flush")

        def capture(self, call, calls):
            assert 1 <= calls <= 64
            return lambda: events.append("replay")

    entrant = Entrant(lambda: events.append("call"), Recording())
    for mode, run in ((COLD, "call"), (WARM, "call"), (GRAPH, "replay")):
        if mode == GRAPH:
            entrant.capture()
        events.clear()
        entrant.time(mode, 2)
        once = ["flush"] * events.index("mark" if mode == COLD else run) + [run] * (mode != COLD)
        assert once[0] == "flush"
        assert events == 2 * [*once, "mark", run, "mark"]


def test_a_provider_that_fails_is_named_and_the_others_go_on():
    measured = Contest(add_case(Provider(OURS, torch.add), Provider("other", fail)), HostDevice()).run(**QUICKLY)
    assert measured.failures == {"other": "RuntimeError: out of memory"}
    assert {name for _, name in measured.timings} == {OURS}
    assert "other FAILED: RuntimeError: out of memory" in measured.summary()


def test_without_ours_the_others_are_not_measured():
    measured = Contest(add_case(Provider(OURS, fail), Provider("other", torch.sub)), HostDevice()).run(**QUICKLY)
    assert measured.failures.keys() == {OURS} and not measured.timings


def test_a_graph_that_cannot_be_captured_costs_that_mode_only():
    class NoGraphs(HostDevice):
        def capture(self, call, calls):
            raise RuntimeError("operation not permitted when stream is capturing")

    measured = Contest(add_case(Provider(OURS, torch.add)), NoGraphs()).run(**QUICKLY)
    assert measured.timings.keys() == {(COLD, OURS), (WARM, OURS)}
    assert measured.failures.keys() == {f"{OURS}, {GRAPH}"}


def test_a_lost_device_ends_the_contest():
    with pytest.raises(DeviceLost) as lost:
        Contest(add_case(Provider(OURS, torch.add), Provider("other", torch.sub)), LostDevice())
    assert lost.value.measured.failures == {OURS: "RuntimeError: CUDA error: an illegal memory access was encountered"}


def test_reasons_are_short():
    assert first_line(ValueError("")) == "ValueError: "
    assert len(first_line(ValueError("x" * 1000))) == 200


# The session


@pytest.fixture(scope="module")
def whole():
    """A session over the small cases, in its own process."""
    return session.run(Settings(**QUICKLY), HostDevice, host.small_cases)


def test_a_session_measures_every_case(whole, monkeypatch, tmp_path):
    small = list(load_small_cases().values())
    assert list(whole.measured) == [case.name for case in ceilings.GPU_CASES + small]
    assert not whole.left_out and not any(measured.failures for measured in whole.measured.values())
    monkeypatch.setattr(report, "load_cases", lambda gpu: [replace(case, shown=True) for case in small])
    results = report.build_gpu_report(whole)
    assert results.machine["kind"] == "nvidia-h100-80gb-hbm3"
    assert {row.mode for row in results.rows} == set(MODES) and {row.threads for row in results.rows} == {None}
    assert results.machine["cuda_kernels"] == ""
    on_cuda = {op: {"cuda": "triton"} for op in whole.capabilities["ops"]}
    on_cuda["ggro_kernels::entropy_topk"] = {"cuda": "native"}
    with_cuda = replace(whole, capabilities={**whole.capabilities, "ops": on_cuda})
    assert report.build_gpu_report(with_cuda).machine["cuda_kernels"] == "entropy_topk"
    ours = [row for row in results.rows if row.provider == OURS]
    assert len(ours) == 3 * len(small)
    copy = results.ceiling(None).copy_gb_per_s
    for row in ours:
        assert row.peak_extra_bytes == (7 if row.mode == COLD else None)
        assert row.ratio is None and row.p20_us <= row.median_us <= row.p80_us
        assert row.bandwidth_percent == pytest.approx(100 * row.gb_per_s / copy, rel=1e-3)

    report.write(results, tmp_path)
    assert BenchmarkReport.load(tmp_path / "kernels.json") == results
    with (tmp_path / "kernels.csv").open() as file:
        assert [row["mode"] for row in csv.DictReader(file)] == [row.mode for row in results.rows]
    printed = format_report(results).splitlines()
    assert printed[0].startswith("NVIDIA H100 80GB HBM3, 79.6 GiB, 50 MiB of L2; ")
    assert sum(GRAPH in line.split("  ") for line in printed) == len(small)
    table = markdown(results).splitlines()
    assert table[2] == "| op | case | dtype | cold L2 | faster than | of ceiling | graph | faster than | of ceiling |"
    assert len(table) == 4 + len(small)
    both = with_table("<!-- kernels: written by `make readme-table` --><!-- kernels: end -->", [results, results])
    assert both.count("| op | case |") == 2


def test_a_report_names_what_is_missing(whole, monkeypatch):
    monkeypatch.setattr(report, "load_cases", lambda gpu: list(load_small_cases().values()))
    cut = replace(whole, left_out=["project_topk[large]"])
    assert format_report(report.build_gpu_report(cut)).splitlines()[1] == (
        "NOT MEASURED: project_topk[large]: no time left"
    )
    with pytest.raises(SessionError, match=r"matmul.* was not measured.*no time left"):
        report.build_gpu_report(GpuSession(whole.machine, whole.capabilities, {}, cut.left_out))


def test_a_budget_that_is_used_up_leaves_the_last_cases_out():
    cut = session.run(Settings(budget=0.0), HostDevice, host.small_cases)
    assert not cut.measured and len(cut.left_out) == len(host.small_cases(None))


def test_after_its_device_is_lost_a_process_is_replaced():
    lost = session.run(Settings(**QUICKLY), LostDevice, host.two)
    assert list(lost.measured) == [case.name for case in ceilings.GPU_CASES[:2]]
    for measured in lost.measured.values():
        assert "illegal memory access" in measured.failures["torch"]


def test_a_case_that_ends_its_process_is_named_and_the_others_go_on():
    names = [case.name for case in host.dying(None)]
    session_ = session.run(Settings(**QUICKLY), HostDevice, host.dying)
    assert list(session_.measured) == names and not session_.left_out
    assert session_.measured[names[1]].failures == {"all providers": "its process ended with exit code 5"}
    assert session_.measured[names[2]].timings


def test_a_case_that_never_ends_is_cut_off(monkeypatch):
    monkeypatch.setattr(session, "CASE_SECONDS", 15.0)
    names = [case.name for case in host.sleeping(None)]
    session_ = session.run(Settings(**QUICKLY), HostDevice, host.sleeping)
    assert session_.measured[names[1]].failures == {"all providers": "no end within 15 s"}
    assert session_.measured[names[0]].timings and session_.measured[names[2]].timings


def test_a_device_that_does_not_start_is_an_error():
    with pytest.raises(SessionError, match="before its first case"):
        session.run(Settings(**QUICKLY), host.cannot_start, host.limits_only)


# The targets


def test_targets_name_rows_of_the_registry():
    known = {(case.op, case.label, str(case.dtype).removeprefix("torch.")): case for case in CASES}
    for target in targets.TARGETS:
        case = known[target.op, target.case, target.dtype]
        assert target.mode in MODES and target.provider in [provider.name for provider in case.providers]
        assert (target.least is None) != (target.most is None)
        if target.mode == GRAPH:
            # What does not fit the cache is timed cold only: that of an H100 has 50 MiB.
            assert case.bytes < 50 << 20


def test_targets_are_met_missed_or_not_measured(whole, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report, "load_cases", lambda gpu: list(load_small_cases().values()))
    results = report.build_gpu_report(whole)
    row = replace(
        results.rows[0], op="entropy_topk", case="64 x 128256", dtype="bfloat16", mode=COLD, bandwidth_percent=59.9
    )
    one = replace(row, case="1 x 128256", mode=GRAPH, median_us=15.0)
    measured = replace(results, rows=[replace(row, provider=OURS), replace(one, provider=OURS)])
    assert targets.lines(measured) == [
        "targets of an H100, on NVIDIA H100 80GB HBM3:",
        "not measured  entropy_topk 64 x 128256 bfloat16, cold L2: times as fast as eager >= 8",
        "missed        entropy_topk 64 x 128256 bfloat16, cold L2: % of the bandwidth of a copy >= 60: 59.9",
        "met           entropy_topk 1 x 128256 bfloat16, graph: microseconds <= 15: 15",
    ]
    eager = replace(row, provider="eager", ratio=8.5)
    assert targets.lines(replace(measured, rows=[eager]))[1].startswith("met ")
    report.write(measured, tmp_path)
    assert targets.main([str(tmp_path / "kernels.json")]) == 0
    assert capsys.readouterr().out.count("\n") == 4
    assert targets.lines(replace(measured, machine={"cpu": "Zen"})) == []


# The command


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("GGRO_IMPL", "auto")


def test_the_command_writes_results(gpu, whole, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(command.gpu_session, "run", lambda settings: asked.append(settings) or whole)
    monkeypatch.setattr(command.gate, "require_green_tests", lambda *_: pytest.fail("tested in spite of --untested"))
    arguments = ["--device", "cuda", "--untested", "--budget", "90", "--output", str(tmp_path / "new")]
    assert command.main(arguments) == 0
    assert asked == [Settings(budget=90.0)]
    assert BenchmarkReport.load(tmp_path / "new" / "kernels.json").machine["gpu"] == "NVIDIA H100 80GB HBM3"
    printed = capsys.readouterr().out
    assert "wrote " in printed and "not measured  entropy_topk 64 x 128256" in printed
    command.main(["--device", "cuda", "--quick", "--op", "project_topk"])
    assert asked[1] == Settings(["project_topk"], quick=True, seconds=0.2, rounds=3)


def test_options_that_do_not_go_together_are_refused(monkeypatch, capsys):
    def message(*arguments):
        with pytest.raises(SystemExit):
            command.main(list(arguments))
        return capsys.readouterr().err

    assert "--budget is for --device cuda" in message("--budget", "3")
    assert "are for the CPU" in message("--device", "cuda", "--threads", "1")
    assert "unknown op 'interleaved_forward'" in message("--device", "cuda", "--op", "interleaved_forward")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees none" in message("--device", "cuda")
