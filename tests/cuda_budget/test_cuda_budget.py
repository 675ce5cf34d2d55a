"""`make cuda-budget` without nvcc: what it reads out of a compiler's words, and what it makes of a budget."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests import sass
from tests.cuda_budget import __main__ as main
from tests.cuda_budget import budget, compilation
from tests.cuda_budget.compilation import Usage, compilations, instance_of, usages

MANGLED = "_ZN4ggro4cuda5entryINS0_12ReduceKernelIfLi32ELb0EEEEEvNT_4ArgsE"
PTXAS = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Zother' for 'sm_80'
    128 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers
ptxas info    : Compiling entry function '{MANGLED}' for 'sm_80'
ptxas info    : Function properties for {MANGLED}
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 41 registers, used 1 barriers, 16 bytes cumulative stack size, 48 bytes smem, 400 bytes cmem[0]
"""
INSTRUCTIONS = """
        /*0000*/  @P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/      LDG.E.LTC128B.128 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/      LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R2.64] ;
        /*0030*/      LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0040*/      LDG.E R8, desc[UR4][R2.64] ;
        /*0050*/      LDS.128 R8, [R9] ;
        /*0060*/      LD.E.64 R8, [R2.64] ;
        /*0070*/      STG.E.64 desc[UR4][R2.64], R4 ;
        /*0080*/      STL [R1], R4 ;
        /*0090*/      LDL.LU R4, [R1] ;
"""
USAGE = Usage("a: K<float>", "sm_80", 41, 0, 0, 0, Counter({16: 2, 4: 9}), Counter({16: 1}), 0)
BUDGET = budget.recorded([USAGE, replace(USAGE, architecture="sm_90a", registers=40)], "13.0")


def test_widths_of_instructions() -> None:
    assert sass.global_loads(INSTRUCTIONS) == {16: 3, 4: 1, 2: 1}
    assert sass.global_stores(INSTRUCTIONS) == {8: 1}
    assert sass.spills(INSTRUCTIONS) == 2
    assert sass.accesses(INSTRUCTIONS, "LD", "ST") == {8: 1}
    assert sass.shown(Counter({2: 1, 16: 3})) == "3x16B 1x2B"


def test_what_a_kernel_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "readable", lambda names: dict.fromkeys(names, "ReduceKernel<float>"))
    (usage,) = usages("entropy_topk", "sm_80", PTXAS, {MANGLED: INSTRUCTIONS})
    assert usage.kernel == "entropy_topk: ReduceKernel<float>"
    assert (usage.registers, usage.stack_bytes, usage.spilled_bytes, usage.shared_bytes) == (41, 16, 32, 48)
    assert usage.generic == 1
    with pytest.raises(RuntimeError, match="ptxas did not tell"):
        usages("entropy_topk", "sm_80", "", {MANGLED: INSTRUCTIONS})


def test_names_are_readable() -> None:
    reduce = "void ggro::cuda::entry<ggro::cuda::ReduceKernel<float, 32, false> >(ggro::cuda::ReduceKernel<...>::Args)"
    assert instance_of(reduce) == "ReduceKernel<float, 32, false>"
    anonymous = "ggro::cuda::(anonymous namespace)::Kernel<ggro::Float16, float>"
    assert instance_of(f"void ggro::cuda::entry<{anonymous} >({anonymous}::Args)") == "Kernel<Float16, float>"
    assert instance_of("void ggro::cuda::entry<ggro::cuda::(anonymous namespace)::Nothing>(int)") == "Nothing"


def test_flags_and_architectures_are_those_of_cmake(tmp_path: Path) -> None:
    targets = "'--generate-code=arch=compute_80,code=[sm_80]' '--generate-code=arch=compute_90a,code=[sm_90a]'"
    ptx = "'--generate-code=arch=compute_90,code=[compute_90]'"
    command = f"/cuda/bin/nvcc -DX -I/csrc -O3 -std=c++17 {targets} {ptx} -x cu -c /csrc/a.cu -o a.cu.o"
    commands = [
        {"file": "/csrc/a.cu", "command": command},
        {"file": "/csrc/b.cpp", "command": "c++ -c b.cpp -o b.o"},
    ]
    found = compilations(commands, tmp_path)
    assert [(work.source, work.architecture) for work in found] == [
        (Path("/csrc/a.cu"), "sm_80"),
        (Path("/csrc/a.cu"), "sm_90a"),
    ]
    assert found[1].command == (
        *("/cuda/bin/nvcc", "-DX", "-I/csrc", "-O3", "-std=c++17", "-x", "cu"),
        *("-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-cubin", "-o", str(found[1].cubin), "/csrc/a.cu"),
    )


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        ({"registers": 48}, None),
        ({"registers": 49}, "49 registers instead of 48"),
        ({"spilled_bytes": 4, "stack_bytes": 8}, "spills 4 bytes"),
        ({"stack_bytes": 8}, "has a stack of 8 bytes"),
        ({"generic": 2}, "2 loads and stores by generic addresses"),
        ({"loads": Counter({8: 9})}, "no 16-byte loads"),
        ({"stores": Counter()}, "no 16-byte stores"),
        ({"kernel": "a: K<double>"}, "not in the budget"),
        ({"architecture": "sm_100"}, "not in the budget"),
    ],
)
def test_a_kernel_keeps_its_budget(change: dict, fault: str | None) -> None:
    assert BUDGET.faults(replace(USAGE, **change)) == ([] if fault is None else [fault])


def test_a_kernel_that_is_gone_is_noticed(capsys: pytest.CaptureFixture) -> None:
    usage_90 = replace(USAGE, architecture="sm_90a")
    assert main.report(BUDGET, [USAGE, replace(usage_90, registers=40)], "13.0") == 0
    assert main.report(BUDGET, [USAGE, replace(usage_90, registers=41)], "13.1") == 1
    assert "1 of 2 failed (nvcc 13.1, recorded with 13.0)" in capsys.readouterr().out
    assert main.report(BUDGET, [replace(USAGE, kernel="b: K")], "13.0") == 1
    assert "a: K<float>: FAILED: recorded, but not there" in capsys.readouterr().out
    assert main.report(budget.Budget("13.0", {}), [], "13.0") == 1


def test_a_budget_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "budget.txt"
    plain = replace(USAGE, kernel="b: Other<float, 32>", loads=Counter(), stores=Counter())
    written = budget.recorded([USAGE, plain], "13.0")
    budget.write(written, path)
    assert budget.read(path) == written
    assert written.lines["a: K<float>"].wide == {"loads", "stores"} and not written.lines[plain.kernel].wide
    kept = budget.read(main.PATH)
    assert kept.lines and all(line.registers.keys() >= {"sm_80", "sm_90a"} for line in kept.lines.values())


def test_recording_anew_keeps_what_must_be_wide() -> None:
    narrow = replace(USAGE, registers=50, loads=Counter({4: 9}), stores=Counter())
    again = budget.recorded([narrow], "13.1", BUDGET)
    assert again.lines["a: K<float>"] == budget.Line({"sm_80": 56}, frozenset({"loads", "stores"}))
    assert again.faults(narrow) == ["no 16-byte loads", "no 16-byte stores"]
    assert not budget.recorded([narrow], "13.1").lines["a: K<float>"].wide


def test_every_source_is_in_the_budget() -> None:
    kept = {kernel.partition(":")[0] for kernel in budget.read(main.PATH).lines}
    assert kept == {path.stem for path in compilation.ROOT.glob("csrc/cuda/*.cu")}


def test_without_nvcc_nothing_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main.main([]) == 0
    assert capsys.readouterr().out.startswith("cuda-budget: nothing is checked, there is no nvcc")


def test_a_disassembler_is_found_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sass.tool.cache_clear()
    monkeypatch.setattr(sass.shutil, "which", lambda name: None)
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="nvdisasm is neither on PATH nor in a package triton"):
        sass.tool("nvdisasm")
    sass.tool.cache_clear()
