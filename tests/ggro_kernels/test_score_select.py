"""score_select through every implementation."""

import pytest
import torch
from torch import inf, nan

from ggro_kernels import ScoreSelect, dispatch
from ggro_kernels.testing import assert_within_budget, bitwise
from tests.ggro_kernels.implementations import on_threads, thread_counts
from tests.ggro_kernels.placed import score_select

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST_UNIFORM = 1 - 2**-24


def inputs(
    rows: int, candidates: int, width: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + candidates + width)
    shapes = ((rows, candidates, width), (width,), (rows, candidates))
    hidden, head, logits = (
        torch.randn(*shape, generator=generator).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return hidden, head, logits


def check(hidden: torch.Tensor, head: torch.Tensor, logits: torch.Tensor, weight: float, impl: str) -> ScoreSelect:
    result = score_select(hidden, head, logits, weight, impl=impl)
    assert result.reward.dtype == result.score.dtype == torch.float32 and result.index.dtype == torch.int64
    assert all(tensor.is_contiguous() for tensor in result)
    rewards = [hidden.to(dtype) @ head.to(dtype) for dtype in (torch.float32, torch.float64)]
    magnitude = (hidden.double().abs() @ head.double().abs()).max().item()
    assert_within_budget(result.reward, *rewards, scale=magnitude, what="reward")
    scores = [logits.to(reward.dtype) + weight * reward for reward in rewards]
    magnitude = abs(weight) * magnitude + logits.double().abs().max().item()
    assert_within_budget(result.score, *scores, scale=magnitude, what="score")
    assert torch.equal(result.index, result.score.argmax(dim=1))
    return result


@pytest.mark.parametrize("hidden_dtype", DTYPES)
@pytest.mark.parametrize("head_dtype", DTYPES)
@pytest.mark.parametrize("logits_dtype", DTYPES)
def test_random_inputs(
    hidden_dtype: torch.dtype, head_dtype: torch.dtype, logits_dtype: torch.dtype, impl: str
) -> None:
    for rows, candidates, width in ((1, 1, 1), (2, 7, 5), (3, 30, 64), (5, 3, 257), (2, 40, 1031)):
        check(*inputs(rows, candidates, width, (hidden_dtype, head_dtype, logits_dtype)), 1.5, impl)


@pytest.mark.parametrize("weight", [0.0, -2.0, 1e6])
def test_weights(weight: float, impl: str) -> None:
    check(*inputs(3, 9, 33), weight, impl)


def test_empty_shapes(impl: str) -> None:
    assert score_select(*inputs(0, 3, 8), 1.0, impl=impl).score.shape == (0, 3)
    hidden, head, logits = inputs(2, 3, 0)
    result = score_select(hidden, head, logits, 1.0, impl=impl)
    assert torch.equal(result.reward, torch.zeros(2, 3)) and torch.equal(result.score, logits)


def test_the_first_of_equal_scores_is_taken(impl: str) -> None:
    # Integers: every score is exact.
    hidden = torch.tensor([[[1.0], [2.0], [0.0], [2.0]], [[0.0], [1.0], [1.0], [0.0]], [[0.0], [0.0], [0.0], [0.0]]])
    logits = torch.tensor([[3.0, 1.0, 5.0, 1.0], [-1.0, 0.0, 0.0, 2.0], [-0.0, 0.0, -0.0, 0.0]])
    result = score_select(hidden, torch.tensor([2.0]), logits, 1.0, impl=impl)
    assert result.score.tolist() == [[5.0, 5.0, 5.0, 5.0], [-1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]
    assert result.index.tolist() == [0, 1, 0]


SPECIAL_LOGITS = torch.tensor(
    [
        [-inf, 1.0, -inf, 2.0],
        [-inf, -inf, -inf, -inf],
        [1.0, nan, 3.0, nan],
        [1.0, inf, inf, 0.0],
        [inf, 0.0, nan, 0.0],
    ]
)


@pytest.mark.parametrize("mode", ["greedy", "categorical"])
def test_special_scores(mode: str, impl: str) -> None:
    uniforms = None if mode == "greedy" else torch.full((5,), LAST_UNIFORM)
    hidden = torch.zeros(5, 4, 2)
    result = score_select(hidden, torch.ones(2), SPECIAL_LOGITS, 1.0, mode=mode, uniforms=uniforms, impl=impl)
    assert result.index.tolist() == [3, 0, 1, 1, 2]
    assert torch.equal(result.score.nan_to_num(nan=7.0), SPECIAL_LOGITS.nan_to_num(nan=7.0))


@pytest.mark.parametrize("reward", [nan, inf, -inf])
def test_padding_is_not_taken_whatever_its_reward(reward: float, impl: str) -> None:
    hidden = torch.tensor([[[reward], [1.0]]])
    result = score_select(hidden, torch.ones(1), torch.tensor([[-inf, -5.0]]), 1.0, impl=impl)
    assert result.index.item() == 1 and result.score.tolist() == [[-inf, -4.0]]
    assert torch.equal(result.reward.nan_to_num(nan=7.0), hidden[..., 0].nan_to_num(nan=7.0))


def affordable_rows(rows: int, impl: str) -> int:
    """`rows`, or a fortieth where a row takes Triton's interpreter several milliseconds."""
    return rows // 40 if impl == "triton" and dispatch.INTERPRETING else rows


def distribution(score: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cumulative probabilities [B, k] in fp64."""
    return (score.double() / temperature).softmax(dim=1).cumsum(dim=1)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0])
def test_categorical_inverts_the_distribution_function(temperature: float, impl: str) -> None:
    rows = affordable_rows(500, impl)
    hidden, head, logits = inputs(rows, 30, 17)
    logits[:, ::7] = -inf
    uniforms = torch.rand(rows, generator=torch.Generator().manual_seed(1))
    result = score_select(
        hidden, head, logits, 1.0, mode="categorical", temperature=temperature, uniforms=uniforms, impl=impl
    )
    greedy = score_select(hidden, head, logits, 1.0, impl=impl)
    assert torch.equal(bitwise(result.score), bitwise(greedy.score))
    cumulative = distribution(result.score, temperature)
    expected = (cumulative <= uniforms.double().unsqueeze(1)).sum(dim=1)
    clear = ((cumulative - uniforms.double().unsqueeze(1)).abs() > 1e-12).all(dim=1)
    assert clear.sum() > 0.98 * rows
    assert torch.equal(result.index[clear], expected[clear])
    assert logits.gather(1, result.index.unsqueeze(1)).isfinite().all()


def test_frequencies(impl: str) -> None:
    draws, probabilities = affordable_rows(20000, impl), torch.tensor([0.5, 0.1, 0.0, 0.25, 0.15])
    result = score_select(
        torch.zeros(draws, 5, 1),
        torch.zeros(1),
        probabilities.log().expand(draws, -1),
        1.0,
        mode="categorical",
        uniforms=torch.rand(draws, generator=torch.Generator().manual_seed(2)),
        impl=impl,
    )
    counts = result.index.bincount(minlength=5).double()
    assert counts[2] == 0
    drawn = probabilities > 0
    expected = draws * probabilities.double()
    chi_square = ((counts - expected)[drawn] ** 2 / expected[drawn]).sum().item()
    # 99.9 % of a chi-square distribution with three degrees of freedom.
    assert chi_square < 16.3


def test_ends_of_the_unit_interval(impl: str) -> None:
    logits = torch.tensor([[-inf, 0.0, 1.0, -200.0, -inf]]).expand(2, -1)
    uniforms = torch.tensor([0.0, LAST_UNIFORM])
    result = score_select(
        torch.zeros(2, 5, 1), torch.ones(1), logits, 1.0, mode="categorical", uniforms=uniforms, impl=impl
    )
    assert result.index.tolist() == [1, 2]


def test_a_uniform_on_a_boundary_takes_the_next(impl: str) -> None:
    uniforms = torch.tensor([0.25, 0.5, 0.75, 0.74999994])
    result = score_select(
        torch.zeros(4, 4, 1), torch.ones(1), torch.zeros(4, 4), 1.0, mode="categorical", uniforms=uniforms, impl=impl
    )
    assert result.index.tolist() == [1, 2, 3, 2]


def test_low_temperature_is_greedy(impl: str) -> None:
    hidden, head, logits = inputs(50, 30, 17)
    uniforms = torch.rand(50, generator=torch.Generator().manual_seed(3))
    result = score_select(
        hidden, head, logits, 1.0, mode="categorical", temperature=1e-30, uniforms=uniforms, impl=impl
    )
    assert torch.equal(result.index, score_select(hidden, head, logits, 1.0, impl=impl).index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_offsets(dtype: torch.dtype, impl: str) -> None:
    hidden, head, logits = inputs(8, 12, 130, (dtype,) * 3)
    check(hidden[::2, 1:9, 1:100], head[1:100], logits[::2, 1:9], 1.0, impl)
    check(hidden[..., ::2], head[::2], logits, 1.0, impl)
    check(hidden.transpose(0, 1), head, logits.t(), 1.0, impl)
    check(hidden[:1].expand(8, -1, -1), head[:1].expand(130), logits[:, :1].expand(-1, 12), 1.0, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_bitwise_the_same_for_any_batch_and_thread_count(dtype: torch.dtype, kernel_impl: str) -> None:
    hidden, head, logits = inputs(20, 25, 1031, (dtype, torch.float32, dtype))
    uniforms = torch.rand(20, generator=torch.Generator().manual_seed(4))

    def bits(first: int, last: int) -> list[torch.Tensor]:
        rows = slice(first, last)
        result = score_select(
            hidden[rows], head, logits[rows], 1.0, mode="categorical", uniforms=uniforms[rows], impl=kernel_impl
        )
        return [result.index, bitwise(result.reward), bitwise(result.score)]

    whole = bits(0, 20)
    for threads in thread_counts(kernel_impl, 1, 2, 3, 8):
        with on_threads(threads):
            for first, last in ((0, 20), (0, 1), (7, 12), (19, 20)):
                for a, b in zip(bits(first, last), whole, strict=True):
                    assert torch.equal(a, b[first:last])


@pytest.mark.parametrize("position", range(3))
def test_fp64_goes_through_the_reference(position: int) -> None:
    dtypes = [torch.float32] * 3
    dtypes[position] = torch.float64
    hidden, head, logits = inputs(3, 5, 64, tuple(dtypes))
    result = score_select(hidden, head, logits, 0.5)
    assert result.score.dtype == result.reward.dtype == torch.float64
    expected = logits.double() + 0.5 * (hidden.double() @ head.double())
    torch.testing.assert_close(result.score, expected, rtol=1e-12, atol=1e-12)


def test_outputs_are_detached(impl: str) -> None:
    arguments = [x.requires_grad_() for x in inputs(3, 5, 8)]
    assert not any(tensor.requires_grad for tensor in score_select(*arguments, 1.0, impl=impl))


@pytest.mark.parametrize("uniform", [1.0, -0.25, nan, inf])
def test_uniform_outside_the_interval(uniform: float, checking_impl: str) -> None:
    uniforms = torch.tensor([0.0, uniform, 0.5])
    with pytest.raises(ValueError, match=rf"uniforms\[1\] must be in \[0, 1\), got {uniform:g}"):
        score_select(*inputs(3, 5, 8), 1.0, mode="categorical", uniforms=uniforms, impl=checking_impl)


HIDDEN, HEAD, LOGITS = inputs(2, 3, 4)
UNIFORMS = torch.zeros(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], HEAD, LOGITS, 1.0), {}, TypeError, r"hidden must be a torch\.Tensor, got list"),
        ((HIDDEN[0], HEAD, LOGITS, 1.0), {}, ValueError, r"hidden must have shape \[B, k, d\], got \[3, 4\]"),
        ((HIDDEN, LOGITS, LOGITS, 1.0), {}, ValueError, r"head must have shape \[d\], got \[2, 3\]"),
        ((HIDDEN, HEAD, HEAD, 1.0), {}, ValueError, r"logits must have shape \[B, k\], got \[4\]"),
        ((HIDDEN, HEAD.to("meta"), LOGITS, 1.0), {}, ValueError, "head must be on cpu as the other tensors, got meta"),
        ((HIDDEN.long(), HEAD, LOGITS, 1.0), {}, TypeError, r"hidden must be float32.*got torch\.int64"),
        ((HIDDEN, HEAD.int(), LOGITS, 1.0), {}, TypeError, r"head must be float32.*got torch\.int32"),
        ((HIDDEN, HEAD, LOGITS.int(), 1.0), {}, TypeError, r"logits must be float32.*got torch\.int32"),
        ((HIDDEN[:, :0], HEAD, LOGITS[:, :0], 1.0), {}, ValueError, r"hidden must have one candidate or more"),
        ((HIDDEN, HEAD[:3], LOGITS, 1.0), {}, ValueError, r"head must have shape \[4\] to go with hidden, got \[3\]"),
        ((HIDDEN, HEAD, LOGITS[:1], 1.0), {}, ValueError, r"logits must have shape \[2, 3\] to go with hidden"),
        ((HIDDEN, HEAD, LOGITS, nan), {}, ValueError, "weight must be in .*got nan"),
        ((HIDDEN, HEAD, LOGITS, inf), {}, ValueError, "weight must be in .*got inf"),
        ((HIDDEN, HEAD, LOGITS, 1.0), {"temperature": 0.0}, ValueError, "temperature must be in .*got 0.0"),
        ((HIDDEN, HEAD, LOGITS, 1.0), {"mode": "sample"}, ValueError, "mode must be 'greedy' or 'categorical', got 's"),
        ((HIDDEN, HEAD, LOGITS, 1.0), {"mode": "categorical"}, ValueError, r"mode='categorical' needs uniforms \[B\]"),
        ((HIDDEN, HEAD, LOGITS, 1.0), {"uniforms": UNIFORMS}, ValueError, "mode='greedy' takes no uniforms: leave"),
    ],
)
def test_bad_arguments(arguments: tuple, options: dict, error: type[Exception], message: str, impl: str) -> None:
    with pytest.raises(error, match=message):
        score_select(*arguments, **options, impl=impl)


@pytest.mark.parametrize(
    ("uniforms", "error", "message"),
    [
        (UNIFORMS.double(), TypeError, r"uniforms must be float32, got torch\.float64"),
        (UNIFORMS[:1], ValueError, r"uniforms must have shape \[2\] to go with hidden, got \[1\]"),
        (UNIFORMS.unsqueeze(0), ValueError, r"uniforms must have shape \[B\], got \[1, 2\]"),
    ],
)
def test_bad_uniforms(uniforms: torch.Tensor, error: type[Exception], message: str, impl: str) -> None:
    with pytest.raises(error, match=message):
        score_select(HIDDEN, HEAD, LOGITS, 1.0, mode="categorical", uniforms=uniforms, impl=impl)
