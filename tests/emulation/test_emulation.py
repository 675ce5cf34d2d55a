"""The emulation finds the mistakes that it is there for, and the order in which threads run changes no bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ggro_kernels import candidate_scores, entropy_topk, project_topk, score_select
from tests.emulation import emulated_kernels
from tests.ggro_kernels.implementations import HAS_GPU, select
from tests.ggro_kernels.op_calls import assert_bitwise_equal

SEEDS = (0, 1, 2, 3)


@pytest.fixture(params=SEEDS)
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("GGRO_EMULATION_SEED", str(request.param))
    return request.param


@pytest.mark.parametrize("kernel", ["neighbours", "neighbours_in_a_warp", "counts", "copies"])
def test_kernels_without_a_mistake_pass(kernel: str, seed: int) -> None:
    emulated_kernels().misuse(kernel)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("out_of_bounds", r"block 0, thread 63: shared memory: elements 63 \.\. 63 of 63"),
        ("unwritten", "read before it is written"),
        ("read_without_barrier", "read without a barrier after thread|written without a barrier after others read"),
        ("write_without_barrier", "read without a barrier after thread|written without a barrier after others read"),
        ("two_writers", "written without a barrier after thread"),
        ("read_without_barrier_in_a_warp", "without a barrier|before it is written"),
        ("barrier_of_a_warp_for_a_block", "without a barrier|before it is written"),
        ("count_read_early", "without a barrier"),
        ("copy_not_awaited", "read before it is written"),
        ("different_exchanges", "while other lanes of the warp are at"),
        ("half_an_exchange", "16 lanes of warp [01] wait at ballot for the others"),
        ("half_a_barrier", "32 threads have ended, and 32 of 64 threads wait at the barrier"),
        ("misaligned", "a load of 16 bytes at an address that is no multiple"),
        ("different_arrays", "differ from those of other threads"),
        ("too_much_shared_memory", "204800 bytes of shared memory"),
        ("empty_grid", "a grid of 0 blocks"),
        ("never_waited", "it never waited for the previous kernel"),
    ],
)
def test_a_mistake_is_an_error_that_says_where(kernel: str, message: str, seed: int) -> None:
    with pytest.raises(RuntimeError, match=message) as error:
        emulated_kernels().misuse(kernel)
    assert str(error.value).startswith(kernel)
    # What an abandoned block left must not disturb the next.
    emulated_kernels().misuse("neighbours")


def calls() -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5001, generator=generator).to(torch.bfloat16)
    # Ties across warps and blocks.
    rounded = (2 * torch.randn(2, 4200, generator=generator)).round()
    table, vectors = (torch.randn(*shape, generator=generator) for shape in ((5000, 70), (5, 70)))
    ids = torch.randint(0, 5000, (5, 7), generator=generator)
    hidden, uniforms = torch.randn(4, 40, 33, generator=generator), torch.rand(4, generator=generator)
    halves = {"gradient": vectors.half(), "table": table.half()}
    return {
        "entropy_topk": lambda: entropy_topk(logits, 25, impl="native"),
        "entropy_topk, ties": lambda: entropy_topk(rounded, 200, impl="native"),
        "candidate_scores": lambda: candidate_scores(vectors, table, ids, impl="native"),
        "project_topk": lambda: project_topk(vectors, table, 25, impl="native"),
        "project_topk, halves": lambda: project_topk(**halves, k=25, impl="native"),
        "score_select": lambda: score_select(
            hidden, hidden[0, 0], hidden[:, :, 0], 1.0, mode="categorical", uniforms=uniforms, impl="native"
        ),
    }


@pytest.mark.skipif(HAS_GPU, reason="with a GPU, the kernels run there")
@pytest.mark.parametrize("call", calls())
def test_the_tests_of_cuda_do_not_run_the_kernels_of_the_cpu(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    select("cuda", monkeypatch)
    monkeypatch.setattr("ggro_kernels.native.native", lambda: pytest.fail("the CPU's kernels ran"))
    calls()[call]()


@pytest.mark.skipif(HAS_GPU, reason="with a GPU, the kernels run there")
@pytest.mark.parametrize("call", calls())
def test_the_order_of_threads_and_blocks_changes_no_bit(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    select("cuda", monkeypatch)
    results = []
    for seed in SEEDS:
        monkeypatch.setenv("GGRO_EMULATION_SEED", str(seed))
        result = calls()[call]()
        results.append(result if isinstance(result, tuple) else (result,))
    for result in results[1:]:
        assert_bitwise_equal(result, results[0])
