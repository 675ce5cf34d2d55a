"""prefix_attention through every implementation, against one dense softmax per token in fp64."""

import itertools
from typing import Any

import pytest
import torch

from ggro_kernels.testing import assert_within_budget, bitwise
from tests.ggro_kernels.implementations import NATIVE, on_threads, thread_counts
from tests.ggro_kernels.placed import prefix_attention

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Arguments = dict[str, Any]


def branch_starts(batch: int, lengths: tuple[int, ...]) -> torch.Tensor:
    starts = [sum(lengths[:index]) for index, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(starts, dtype=torch.int64).repeat(batch, 1)


def inputs(
    batch: int,
    query_heads: int,
    key_heads: int,
    width: int,
    prefix: int,
    branches: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    value_width: int | None = None,
) -> Arguments:
    tokens = sum(branches)
    generator = torch.Generator().manual_seed(query_heads + width + prefix + tokens)

    def normal(heads: int, length: int, width: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, width, generator=generator).to(dtype)

    key, value = normal(key_heads, prefix + tokens, width), normal(key_heads, prefix + tokens, value_width or width)
    return {
        "query": normal(query_heads, tokens, width),
        "prefix_key": key[:, :, :prefix],
        "prefix_value": value[:, :, :prefix],
        "branch_key": key[:, :, prefix:],
        "branch_value": value[:, :, prefix:],
        "branch_starts": branch_starts(batch, branches),
    }


def attend_token_by_token(arguments: Arguments, dtype: torch.dtype) -> torch.Tensor:
    """Each token's own sequence, prefix and branch, laid out and attended to without any mask."""
    query, prefix_key, prefix_value, branch_key, branch_value = (
        arguments[name].to(dtype) for name in ("query", "prefix_key", "prefix_value", "branch_key", "branch_value")
    )
    batch, query_heads, tokens, width = query.shape
    scale = arguments.get("scale", width**-0.5)
    ends = arguments.get("branch_ends")
    if ends is None:
        ends = torch.arange(tokens).expand(batch, -1)
    output = query.new_zeros(batch, query_heads, tokens, prefix_value.shape[3])
    for b in range(batch):
        lengths = arguments.get("prefix_lengths")
        length = prefix_key.shape[2] if lengths is None else int(lengths[b])
        for i in range(tokens):
            own = slice(int(arguments["branch_starts"][b, i]), int(ends[b, i]) + 1)
            keys = torch.cat([prefix_key[b, :, :length], branch_key[b, :, own]], 1)
            values = torch.cat([prefix_value[b, :, :length], branch_value[b, :, own]], 1)
            seen = min(keys.shape[1], arguments.get("window") or keys.shape[1])
            for h in range(query_heads):
                key_head = h * len(keys) // query_heads
                scores = keys[key_head, -seen:] @ query[b, h, i] * scale
                if arguments.get("softcap"):
                    scores = arguments["softcap"] * torch.tanh(scores / arguments["softcap"])
                output[b, h, i] = scores.softmax(0) @ values[key_head, -seen:]
    return output


def largest_finite(x: torch.Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return finite.max().item() if len(finite) else 0.0


def check(arguments: Arguments, impl: str) -> torch.Tensor:
    query = arguments["query"]
    output = prefix_attention(**arguments, impl=impl)
    assert output.dtype == query.dtype
    assert output.shape == (*query.shape[:3], arguments["prefix_value"].shape[3])
    oracle = attend_token_by_token(arguments, torch.float64)
    # Rounded to the dtype of the output, as the op's result is.
    same_precision = attend_token_by_token(arguments, torch.float32).to(query.dtype)
    key, value = (torch.cat([arguments[f"prefix_{kind}"], arguments[f"branch_{kind}"]], 2) for kind in ("key", "value"))
    scores = query.float().unflatten(1, (key.shape[1], -1)).flatten(2, 3) @ key.float().mT
    # A score's fp32 rounding, relative to the score, is the relative error of a weight.
    score = largest_finite(scores) * abs(arguments.get("scale", query.shape[3] ** -0.5))
    fp32_terms = (1 + score) * largest_finite(value) * torch.finfo(torch.float32).eps
    assert_within_budget(output, same_precision, oracle, scale=fp32_terms / torch.finfo(query.dtype).eps, what="output")
    return output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_heads", "key_heads"), [(1, 1), (3, 3), (4, 2), (4, 1), (8, 1), (16, 2)])
def test_grouped_heads(query_heads: int, key_heads: int, dtype: torch.dtype, impl: str) -> None:
    check(inputs(2, query_heads, key_heads, 32, 67, (1, 3, 2), dtype), impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("prefix", "branches"),
    [
        (0, (1,)),
        (0, (5, 2)),
        (1, (1, 1)),
        (63, (4,)),
        (64, (3, 1, 4)),
        (65, (1,) * 25),
        (130, (70, 1, 66)),
        (300, (8,) * 8),
    ],
)
def test_ragged_branches(prefix: int, branches: tuple[int, ...], dtype: torch.dtype, impl: str) -> None:
    check(inputs(1, 2, 1, 16, prefix, branches, dtype), impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "value_width"),
    [(1, 1), (3, 5), (17, 17), (31, 64), (33, 8), (80, 80), (192, 128), (256, 256), (300, 270)],
)
def test_widths(width: int, value_width: int, dtype: torch.dtype, impl: str) -> None:
    check(inputs(1, 4, 2, width, 40, (2, 3), dtype, value_width), impl)


def test_one_branch_is_causal_attention(impl: str) -> None:
    arguments = inputs(2, 4, 4, 32, 0, (150,))
    output = prefix_attention(**arguments, impl=impl)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(arguments[name].double() for name in ("query", "branch_key", "branch_value")), is_causal=True
    )
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefix_lengths(dtype: torch.dtype, impl: str) -> None:
    arguments = inputs(4, 4, 2, 24, 131, (1, 4, 2), dtype)
    arguments["prefix_lengths"] = torch.tensor([131, 0, 64, 7])
    # What lies beyond the lengths is like memory that was never written.
    for row, length in enumerate(arguments["prefix_lengths"].tolist()):
        arguments["prefix_key"][row, :, length:] = torch.nan
        arguments["prefix_value"][row, :, length:] = torch.inf
    assert check(arguments, impl).isfinite().all()


@pytest.mark.parametrize(
    ("impl", "dtype", "window"),
    [
        *itertools.product(("reference", *NATIVE), DTYPES, (1, 2, 5, 63, 64, 65, 99, 100, 101, 130, 2**40)),
        *itertools.product(("triton", "cuda"), (torch.float16,), (1, 63, 65, 100, 2**40)),
        *itertools.product(("triton", "cuda"), (torch.float32,), (101,)),
        *itertools.product(("triton", "cuda"), (torch.bfloat16,), (64,)),
    ],
    indirect=["impl"],
)
def test_window(impl: str, dtype: torch.dtype, window: int) -> None:
    arguments = inputs(2, 4, 2, 24, 100, (1, 9, 3, 80), dtype)
    check(arguments | {"window": window, "prefix_lengths": torch.tensor([100, 37])}, impl)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0, 1e6])
def test_softcap(softcap: float, impl: str) -> None:
    arguments = inputs(1, 4, 2, 64, 150, (2, 3))
    arguments["query"] = arguments["query"] * 8
    check(arguments | {"softcap": softcap}, impl)
    check(arguments | {"softcap": softcap, "window": 70, "scale": 0.3}, impl)


@pytest.mark.parametrize("scale", [0.0, -0.2, 1e-3, 3.0])
def test_scale(scale: float, impl: str) -> None:
    check(inputs(1, 4, 2, 24, 100, (2, 3)) | {"scale": scale}, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype, impl: str) -> None:
    arguments = inputs(2, 4, 2, 34, 90, (3, 6), dtype)
    expected = check(arguments, impl)
    token_major = {
        name: arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("query", "prefix_key", "prefix_value", "branch_key", "branch_value")
    }
    inner = {name: torch.cat([x, x], 3)[..., : x.shape[3]] for name, x in token_major.items()}
    backwards = {name: x.transpose(2, 3).contiguous().transpose(2, 3) for name, x in token_major.items()}
    for views in (token_major, inner, backwards):
        assert torch.equal(prefix_attention(**arguments | views, impl=impl), expected)
    shared = {name: arguments[name][:1].expand(2, -1, -1, -1) for name in ("prefix_key", "prefix_value")}
    check(arguments | shared, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_addresses(dtype: torch.dtype, kernel_impl: str) -> None:
    arguments = inputs(1, 4, 2, 72, 130, (3, 20), dtype)
    expected = bitwise(prefix_attention(**arguments, impl=kernel_impl))
    tensors = ("query", "prefix_key", "prefix_value", "branch_key", "branch_value")
    odd = {name: torch.nn.functional.pad(arguments[name], (1, 2))[..., 1:73] for name in tensors}
    assert torch.equal(bitwise(prefix_attention(**arguments | odd, impl=kernel_impl)), expected)


# Not by interpreted Triton, which takes a quarter of a minute for it.
@pytest.mark.parametrize("impl", ["reference", *NATIVE, "cuda"], indirect=True)
def test_long_prefix(impl: str) -> None:
    arguments = inputs(1, 2, 1, 8, 17500, (2,))
    check(arguments, impl)
    check(arguments | {"window": 16500, "prefix_lengths": torch.tensor([17000])}, impl)


@pytest.mark.parametrize("tokens", [(), (3,)])
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_attend(tokens: tuple[int, ...], batch: int, impl: str) -> None:
    check(inputs(batch, 4, 2, 16, 20, tokens), impl)


def test_equal_scores_give_the_mean(impl: str) -> None:
    arguments = inputs(1, 4, 2, 16, 700, (1,))
    arguments["query"] = torch.zeros_like(arguments["query"])
    mean = torch.cat([arguments["prefix_value"], arguments["branch_value"]], 2).mean(2, keepdim=True)
    torch.testing.assert_close(prefix_attention(**arguments, impl=impl), mean.repeat_interleave(2, 1))


@pytest.mark.parametrize("magnitude", [1e3, 1e18])
def test_huge_scores_do_not_overflow(magnitude: float, impl: str) -> None:
    arguments = inputs(1, 4, 2, 16, 200, (2, 3))
    arguments["query"] = arguments["query"] * magnitude
    arguments["prefix_key"] = arguments["prefix_key"] * magnitude
    output = prefix_attention(**arguments, impl=impl)
    assert output.isfinite().all()
    # So far apart that the softmax takes one key each.
    assert torch.equal(output, attend_token_by_token(arguments, torch.float64).float())


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_infinite_and_nan_keys(softcap: float | None, impl: str) -> None:
    arguments = inputs(1, 2, 1, 8, 150, (1, 1, 2)) | {"softcap": softcap}
    arguments["query"] = arguments["query"].abs()
    arguments["prefix_key"][..., 3, :] = -torch.inf
    arguments["prefix_key"][..., 64:130, :] = -torch.inf
    assert check(arguments, impl).isfinite().all()
    arguments["branch_key"][..., 1, :] = torch.inf
    arguments["branch_key"][..., 2, 5] = torch.nan
    output = prefix_attention(**arguments, impl=impl)
    assert output[:, :, 0].isfinite().all() and output[:, :, 2:].isnan().all()
    assert output[:, :, 1].isnan().all() if softcap is None else output[:, :, 1].isfinite().all()
    arguments["prefix_key"][..., :] = -torch.inf
    arguments["branch_key"][..., 0, :] = -torch.inf
    assert prefix_attention(**arguments, impl=impl)[:, :, 0].isnan().all() == (softcap is None)


def test_values_that_are_infinite_or_nan(impl: str) -> None:
    arguments = inputs(1, 2, 1, 8, 70, (3,))
    arguments["prefix_value"][..., 5, 2] = torch.inf
    arguments["prefix_value"][..., 69, 3] = torch.nan
    output = check(arguments, impl)
    assert (output[..., 2] == torch.inf).all() and output[..., 3].isnan().all() and output[..., 4:].isfinite().all()


def test_what_a_token_does_not_see_may_be_nan(kernel_impl: str) -> None:
    prefix, window = 150, 90
    arguments = inputs(1, 4, 2, 32, prefix, (3, 70, 2)) | {"window": window}
    expected = prefix_attention(**arguments, impl=kernel_impl)
    whole = {
        kind: torch.cat([arguments[f"prefix_{kind}"], arguments[f"branch_{kind}"]], 2) for kind in ("key", "value")
    }
    # What is spoilt and who sees it: keys that leave the window after a branch's first token, a branch, a late token.
    for first, end, seen_by in (
        (0, prefix - window + 2, [0, 3, 73]),
        (prefix + 3, prefix + 73, [*range(3, 73)]),
        (prefix + 40, prefix + 41, [*range(40, 73)]),
    ):
        spoilt = dict(arguments)
        for kind, tokens in whole.items():
            tokens = tokens.clone()
            tokens[:, :, first:end] = torch.nan
            spoilt[f"prefix_{kind}"], spoilt[f"branch_{kind}"] = tokens[:, :, :prefix], tokens[:, :, prefix:]
        output = prefix_attention(**spoilt, impl=kernel_impl)
        assert output[:, :, seen_by].isnan().all()
        others = [token for token in range(75) if token not in seen_by]
        assert torch.equal(bitwise(output[:, :, others]), bitwise(expected[:, :, others]))


OPTIONS: tuple[Arguments, ...] = ({}, {"window": 100}, {"softcap": 3.0})


@pytest.mark.parametrize(
    ("kernel_impl", "dtype", "options", "branches", "prefix"),
    [
        *itertools.product(NATIVE, DTYPES, OPTIONS, [(1, 30, 1, 70, 3)], [333]),
        *(
            (impl, dtype, options, (1, 20, 1, 3), 270)
            for impl in ("triton", "cuda")
            for dtype, options in zip(DTYPES, OPTIONS, strict=True)
        ),
    ],
    indirect=["kernel_impl"],
)
def test_result_is_bitwise_the_same_alone_in_any_batch_and_on_any_threads(
    kernel_impl: str, dtype: torch.dtype, options: Arguments, branches: tuple[int, ...], prefix: int
) -> None:
    arguments = inputs(2, 6, 2, 40, prefix, branches, dtype) | options
    whole = bitwise(prefix_attention(**arguments, impl=kernel_impl))
    for threads in thread_counts(kernel_impl, 2, 3, 8):
        with on_threads(threads):
            assert torch.equal(bitwise(prefix_attention(**arguments, impl=kernel_impl)), whole)
    # Every branch by itself in a batch of one, then cut short.
    for index, length in enumerate(branches):
        first = sum(branches[:index])
        for kept in {length, (length + 1) // 2}:
            part = slice(first, first + kept)
            alone = {
                "query": arguments["query"][1:, :, part],
                "prefix_key": arguments["prefix_key"][1:],
                "prefix_value": arguments["prefix_value"][1:],
                "branch_key": arguments["branch_key"][1:, :, part],
                "branch_value": arguments["branch_value"][1:, :, part],
                "branch_starts": torch.zeros(1, kept, dtype=torch.int64),
            }
            output = prefix_attention(**alone, **options, impl=kernel_impl)
            assert torch.equal(bitwise(output), whole[1:, :, part])
    # One pair of heads by itself, and a buffer longer than the prefix.
    heads = {name: arguments[name][:, 1:] for name in ("prefix_key", "prefix_value", "branch_key", "branch_value")}
    heads["query"] = arguments["query"][:, 3:]
    assert torch.equal(bitwise(prefix_attention(**arguments | heads, impl=kernel_impl)), whole[:, 3:])
    longer = {name: torch.cat([arguments[name]] * 2, 2) for name in ("prefix_key", "prefix_value")}
    longer["prefix_lengths"] = torch.tensor([prefix, prefix])
    assert torch.equal(bitwise(prefix_attention(**arguments | longer, impl=kernel_impl)), whole)


def test_fp64_goes_through_the_reference() -> None:
    arguments = inputs(2, 4, 2, 24, 50, (2, 3), torch.float64) | {"window": 20, "softcap": 4.0}
    output = prefix_attention(**arguments)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, attend_token_by_token(arguments, torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("branch_starts", (1, 4), 5, r"branch_starts\[1, 4\] must be in 0 \.\. 4, the tokens up to this one, got 5"),
        ("branch_starts", (0, 0), -1, r"branch_starts\[0, 0\] must be in 0 \.\. 0, the tokens up to this one, got -1"),
        ("prefix_lengths", (1,), 51, r"prefix_lengths\[1\] must be in 0 \.\. 50, the prefix tokens there are, got 51"),
        ("prefix_lengths", (0,), -1, r"prefix_lengths\[0\] must be in 0 \.\. 50, the prefix tokens there are, got -1"),
    ],
)
def test_index_out_of_range(name: str, place: tuple[int, ...], value: int, message: str, checking_impl: str) -> None:
    arguments = inputs(2, 4, 2, 24, 50, (2, 3)) | {"prefix_lengths": torch.tensor([50, 50])}
    arguments[name][place] = value
    with pytest.raises(IndexError, match=message):
        prefix_attention(**arguments, impl=checking_impl)


@pytest.mark.parametrize("kernel_impl", ["cuda"], indirect=True)
@pytest.mark.parametrize("bad", [-1, 2**40])
def test_token_of_an_unchecked_index_out_of_range_is_nan(bad: int, kernel_impl: str) -> None:
    arguments = inputs(2, 4, 2, 24, 50, (2, 20)) | {"prefix_lengths": torch.tensor([50, 50])}
    expected = prefix_attention(**arguments, impl=kernel_impl)
    arguments["branch_starts"][1, 4] = bad
    expected[1, :, 4] = torch.nan
    assert torch.equal(prefix_attention(**arguments, impl=kernel_impl).nan_to_num(0.5), expected.nan_to_num(0.5))
    arguments["prefix_lengths"][0] = bad
    expected[0] = torch.nan
    assert torch.equal(prefix_attention(**arguments, impl=kernel_impl).nan_to_num(0.5), expected.nan_to_num(0.5))


@pytest.mark.parametrize("kernel_impl", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_values_that_only_some_tokens_see(dtype: torch.dtype, kernel_impl: str) -> None:
    arguments = inputs(1, 4, 2, 24, 150, (40, 3), dtype) | {"window": 100}
    expected = prefix_attention(**arguments, impl=kernel_impl)
    spoilt = {name: arguments[name].clone() for name in ("prefix_value", "branch_value")}
    spoilt["prefix_value"][:, :, 60, 0], spoilt["prefix_value"][:, :, 62, 3] = torch.inf, torch.nan
    spoilt["branch_value"][:, :, 20, 0], spoilt["branch_value"][:, :, 22, 1] = -torch.inf, torch.inf
    output = check(arguments | spoilt, kernel_impl)
    finite = output.isfinite()
    assert 0 < (~finite).sum() < 0.2 * finite.numel()
    assert torch.equal(bitwise(output)[finite], bitwise(expected)[finite])


GOOD = inputs(2, 4, 2, 8, 5, (2, 1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, r"query must be a torch\.Tensor, got list"),
        ({"query": GOOD["query"][0]}, ValueError, r"query must have shape \[B, Hq, T, D\], got \[4, 3, 8\]"),
        ({"query": GOOD["query"].long()}, TypeError, r"query must be float32.*got torch\.int64"),
        ({"query": GOOD["query"][:, :3]}, ValueError, "query must have a multiple of the Hkv=2 key heads, got Hq=3"),
        ({"prefix_key": GOOD["prefix_key"].to("meta")}, ValueError, "prefix_key must be on cpu"),
        (
            {"prefix_key": GOOD["prefix_key"].half()},
            TypeError,
            r"prefix_key must be of the query's dtype torch\.float32",
        ),
        ({"prefix_key": GOOD["prefix_key"][..., :7]}, ValueError, r"prefix_key must have shape \[2, 2, 5, 8\] to go"),
        (
            {"prefix_value": GOOD["prefix_value"][:, :, :4]},
            ValueError,
            r"prefix_value must have shape \[2, 2, 5, 8\] to",
        ),
        ({"branch_key": GOOD["branch_key"][:, :1]}, ValueError, r"branch_key must have shape \[2, 2, 3, 8\] to go"),
        (
            {"branch_value": GOOD["branch_value"][:, :, :2]},
            ValueError,
            r"branch_value must have shape \[2, 2, 3, 8\] to",
        ),
        ({"branch_starts": GOOD["branch_starts"].int()}, TypeError, r"branch_starts must be int64, got torch\.int32"),
        (
            {"branch_starts": GOOD["branch_starts"][:1]},
            ValueError,
            r"branch_starts must have shape \[2, 3\] to go with query",
        ),
        ({"prefix_lengths": torch.tensor([1, 2, 3])}, ValueError, r"prefix_lengths must have shape \[2\] to go"),
        ({"prefix_lengths": torch.tensor([1.0, 2.0])}, TypeError, r"prefix_lengths must be int64, got torch\.float32"),
        ({"softcap": 0.0}, ValueError, r"softcap must be in 1e-30 \.\. 1e\+30, got 0\.0"),
        ({"softcap": 1e-50}, ValueError, "softcap must be in"),
        ({"softcap": 1e50}, ValueError, "softcap must be in"),
        ({"softcap": float("nan")}, ValueError, "softcap must be in"),
        ({"window": 0}, ValueError, "window must be at least 1, or None for no window, got 0"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
    ],
)
def test_bad_arguments(changes: Arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prefix_attention(**GOOD | changes)
