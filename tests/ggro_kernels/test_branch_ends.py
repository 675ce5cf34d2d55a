"""prefix_attention with `branch_ends`: tokens of branches that lie anywhere in one buffer."""

import itertools

import pytest
import torch

from ggro_kernels.testing import bitwise
from tests.ggro_kernels.implementations import IMPLEMENTATIONS, KERNELS, NATIVE, on_threads, thread_counts
from tests.ggro_kernels.placed import prefix_attention
from tests.ggro_kernels.test_prefix_attention import DTYPES, Arguments, check, inputs

pytestmark = pytest.mark.usefixtures("poisoned_empty")

every_impl = pytest.mark.parametrize("impl", (*IMPLEMENTATIONS, "cuda"), indirect=True)
every_kernel = pytest.mark.parametrize("kernel_impl", (*KERNELS, "cuda"), indirect=True)

Spans = tuple[tuple[int, int], ...]
"""First and last branch token that each token of a row sees."""

DECODED: Spans = ((40, 43), (0, 0), (80, 98), (120, 159), (20, 35), (60, 76))
OVERLAPPING: Spans = ((5, 90), (5, 20), (5, 5), (90, 90), (0, 129), (17, 100), (17, 18), (129, 129))


def buffered(
    heads: tuple[int, int],
    width: int,
    prefix: int,
    rows: tuple[Spans, ...],
    room: int,
    dtype: torch.dtype = torch.float32,
    value_width: int | None = None,
) -> Arguments:
    """A row for every tuple of spans, all in a buffer of `room` branch tokens that is NaN where no token looks."""
    tokens = len(rows[0])
    arguments = inputs(len(rows), *heads, width, prefix, (max(room, tokens),), dtype, value_width)
    starts, ends = torch.tensor(rows).unbind(2)
    place = torch.arange(room)
    seen = ((place >= starts[:, :, None]) & (place <= ends[:, :, None])).any(1)
    for name in ("branch_key", "branch_value"):
        arguments[name] = arguments[name][:, :, :room].masked_fill(~seen[:, None, :, None], torch.nan)
    return arguments | {"query": arguments["query"][:, :, :tokens], "branch_starts": starts, "branch_ends": ends}


def of_tokens(arguments: Arguments, tokens: list[int]) -> Arguments:
    """The call with these of the tokens alone."""
    chosen = {name: arguments[name][:, tokens] for name in ("branch_starts", "branch_ends")}
    return arguments | chosen | {"query": arguments["query"][:, :, tokens]}


@every_impl
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("prefix", "rows", "room"),
    [
        (67, (DECODED, DECODED[::-1]), 160),
        (0, (OVERLAPPING,), 130),
        (130, (((0, 0),), ((2, 2),)), 3),
        (1, (((0, 0), (0, 0), (0, 0)),), 1),
        (300, (((500, 530), (0, 3)),), 531),
    ],
)
def test_spans(prefix: int, rows: tuple[Spans, ...], room: int, dtype: torch.dtype, impl: str) -> None:
    assert check(buffered((4, 2), 24, prefix, rows, room, dtype), impl).isfinite().all()


@every_impl
@pytest.mark.parametrize(("query_heads", "key_heads", "width", "value_width"), [(3, 3, 17, 5), (16, 1, 300, 270)])
def test_heads_and_widths(query_heads: int, key_heads: int, width: int, value_width: int, impl: str) -> None:
    check(buffered((query_heads, key_heads), width, 40, (DECODED,), 160, value_width=value_width), impl)


@every_impl
@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 10}, {"window": 60}, {"softcap": 2.0, "scale": 0.4}, {"window": 2**40}]
)
def test_options(options: Arguments, impl: str) -> None:
    arguments = buffered((4, 2), 24, 100, (DECODED, OVERLAPPING[:6]), 160) | options
    arguments["prefix_lengths"] = torch.tensor([100, 37])
    arguments["prefix_value"][1, :, 37:] = torch.nan
    check(arguments, impl)


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": 50, "softcap": 3.0}])
def test_ends_at_the_tokens_themselves_are_the_default(
    options: Arguments, dtype: torch.dtype, kernel_impl: str
) -> None:
    arguments = inputs(2, 4, 2, 24, 100, (3, 20, 1), dtype) | options
    expected = prefix_attention(**arguments, impl=kernel_impl)
    ends = torch.arange(24).expand(2, -1)
    assert torch.equal(bitwise(prefix_attention(**arguments, branch_ends=ends, impl=kernel_impl)), bitwise(expected))


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_gives_the_bits_of_one_forward_over_all_branches(dtype: torch.dtype, kernel_impl: str) -> None:
    lengths = (3, 20, 1, 70)
    arguments = inputs(2, 4, 2, 24, 100, lengths, dtype)
    last = [length - 1 for length in itertools.accumulate(lengths)]
    whole = bitwise(prefix_attention(**arguments, impl=kernel_impl))[:, :, last]
    firsts = [end - length + 1 for end, length in zip(last, lengths, strict=True)]
    # The branches far from each other, in another order than their tokens.
    places = (300, 0, 120, 200)
    room: dict[str, torch.Tensor] = {}
    for name in ("branch_key", "branch_value"):
        room[name] = arguments[name].new_full((2, 2, 310, 24), torch.nan)
        for place, first, length in zip(places, firsts, lengths, strict=True):
            room[name][:, :, place : place + length] = arguments[name][:, :, first : first + length]
    starts = torch.tensor(places).expand(2, -1)
    decoded = {"query": arguments["query"][:, :, last], "branch_starts": starts}
    decoded["branch_ends"] = starts + torch.tensor(lengths) - 1
    assert torch.equal(bitwise(prefix_attention(**arguments | room | decoded, impl=kernel_impl)), whole)


@pytest.mark.parametrize(
    ("kernel_impl", "dtype", "heads", "spans", "repeats"),
    [
        *itertools.product(NATIVE, DTYPES, [(6, 2), (12, 1)], [DECODED, OVERLAPPING], [30]),
        *itertools.product(("cuda",), DTYPES, [(6, 2)], [OVERLAPPING], [10]),
        ("triton", torch.float32, (6, 2), DECODED, 1),
        ("triton", torch.float16, (6, 2), OVERLAPPING, 3),
    ],
    indirect=["kernel_impl"],
)
def test_a_token_has_the_same_bits_whatever_else_is_there(
    kernel_impl: str, dtype: torch.dtype, heads: tuple[int, int], spans: Spans, repeats: int
) -> None:
    arguments = buffered(heads, 40, 270, (spans, spans[::-1]), 160, dtype) | {"window": 250}
    whole = bitwise(prefix_attention(**arguments, impl=kernel_impl))

    of_row = {name: x[1:] if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    count = len(spans)
    for threads in thread_counts(kernel_impl, 2, 3, 8):
        with on_threads(threads):
            assert torch.equal(bitwise(prefix_attention(**arguments, impl=kernel_impl)), whole)
    for chosen in ([*range(count)][::-1], [0, 0, 2], [1], [4]):
        output = prefix_attention(**of_tokens(arguments, chosen), impl=kernel_impl)
        assert torch.equal(bitwise(output), whole[:, :, chosen])
        alone = prefix_attention(**of_tokens(of_row, chosen), impl=kernel_impl)
        assert torch.equal(bitwise(alone), whole[1:, :, chosen])
    # More tokens than tiles of rows have, and the same branches elsewhere in a larger buffer.
    many = [*range(count)] * repeats
    assert torch.equal(bitwise(prefix_attention(**of_tokens(arguments, many), impl=kernel_impl)), whole[:, :, many])
    moved = {name: torch.cat([arguments[name]] * 3, 2) for name in ("branch_key", "branch_value")}
    moved |= {name: arguments[name] + 160 for name in ("branch_starts", "branch_ends")}
    assert torch.equal(bitwise(prefix_attention(**arguments | moved, impl=kernel_impl)), whole)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        (
            "branch_ends",
            (1, 2),
            160,
            r"branch_ends\[1, 2\] must be in 0 \.\. 159, the branch tokens there are, got 160",
        ),
        ("branch_ends", (0, 0), -1, r"branch_ends\[0, 0\] must be in 0 \.\. 159, the branch tokens there are, got -1"),
        ("branch_starts", (0, 1), 1, r"branch_starts\[0, 1\] must be in 0 \.\. 0, the tokens up to this one, got 1"),
        ("branch_starts", (1, 0), -1, r"branch_starts\[1, 0\] must be in 0 \.\. 43, the tokens up to this one, got -1"),
    ],
)
def test_index_out_of_range(name: str, place: tuple[int, int], value: int, message: str, checking_impl: str) -> None:
    arguments = buffered((4, 2), 8, 5, (DECODED, DECODED), 160)
    arguments[name] = arguments[name].clone()
    arguments[name][place] = value
    with pytest.raises(IndexError, match=message):
        prefix_attention(**arguments, impl=checking_impl)


@pytest.mark.parametrize("kernel_impl", ["cuda"], indirect=True)
@pytest.mark.parametrize("name", ["branch_starts", "branch_ends"])
@pytest.mark.parametrize("bad", [-1, 2**40])
def test_token_of_an_unchecked_index_out_of_range_is_nan(bad: int, name: str, kernel_impl: str) -> None:
    arguments = buffered((4, 2), 8, 5, (DECODED, DECODED), 160)
    expected = prefix_attention(**arguments, impl=kernel_impl)
    arguments[name] = arguments[name].clone()
    arguments[name][1, 3] = bad
    expected[1, :, 3] = torch.nan
    assert torch.equal(prefix_attention(**arguments, impl=kernel_impl).nan_to_num(0.5), expected.nan_to_num(0.5))


GOOD = buffered((4, 2), 8, 5, (((0, 1), (3, 3)),) * 2, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"branch_ends": [1]}, TypeError, r"branch_ends must be a torch\.Tensor, got list"),
        ({"branch_ends": GOOD["branch_ends"].int()}, TypeError, r"branch_ends must be int64, got torch\.int32"),
        ({"branch_ends": GOOD["branch_ends"][:, :1]}, ValueError, r"branch_ends must have shape \[2, 2\] to go with"),
        ({"branch_ends": GOOD["branch_ends"].to("meta")}, ValueError, "branch_ends must be on cpu"),
        ({"branch_ends": None}, ValueError, r"branch_key must have shape \[2, 2, 2, 8\] to go"),
        ({"branch_value": GOOD["branch_value"][:, :, :3]}, ValueError, r"branch_value must have shape \[2, 2, 4, 8\]"),
        (
            {name: GOOD[name][:, :, :0] for name in ("branch_key", "branch_value")},
            ValueError,
            "branch_key must have at least one token for branch_ends to point at, got M=0",
        ),
    ],
)
def test_bad_arguments(changes: Arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prefix_attention(**GOOD | changes)
