"""Branches that share a prefix, against one sdpa call with a dense mask over the packed tree."""

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.registry import Case, Inputs, Provider, importable, ours


def packed(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    branch_key: torch.Tensor,
    branch_value: torch.Tensor,
    branch_starts: torch.Tensor,
) -> Inputs:
    """Prefix and branches in one cache, and the mask, which a model makes once for all layers."""
    tokens = torch.arange(query.shape[2])
    own = (tokens >= branch_starts[:, :, None]) & (tokens <= tokens[:, None])
    prefix = torch.ones(*own.shape[:2], prefix_key.shape[2], dtype=torch.bool)
    return {
        "query": query,
        "key": torch.cat([prefix_key, branch_key], dim=2),
        "value": torch.cat([prefix_value, branch_value], dim=2),
        "mask": torch.cat([prefix, own], dim=2)[:, None],
    }


def sdpa_repeat_kv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What transformers does with an explicit mask: every key head is copied for its group of query heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def sdpa_gqa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def flashinfer_layout(**inputs: torch.Tensor) -> Inputs:
    """The same for a library that takes one sequence as [tokens, heads, width]."""
    tree = packed(**inputs)
    sequence = {name: tree[name][0].transpose(0, 1).contiguous() for name in ("query", "key", "value")}
    return {**sequence, "mask": tree["mask"][0, 0].contiguous()}


def flashinfer_prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    import flashinfer

    return flashinfer.single_prefill_with_kv_cache(query, key, value, custom_mask=mask)


FLASHINFER = Provider(
    "flashinfer, mask", flashinfer_prefill, prepare=flashinfer_layout, available=importable("flashinfer")
)


def gradients_of(attend: Callable[..., torch.Tensor]) -> Callable[..., list[torch.Tensor | None]]:
    """What reaches the floating inputs, by the whole way there and back."""

    def run(**inputs: torch.Tensor) -> list[torch.Tensor | None]:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
        output = attend(**inputs | leaves)
        return list(torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output), allow_unused=True))

    return run


def case(
    branches: int,
    length: int,
    prefix: int,
    dtype: torch.dtype,
    heads: tuple[int, int, int] = (32, 8, 128),
    libraries: tuple[Provider, ...] = (),
    gradients: bool = False,
    **flags: bool,
) -> Case:
    """With `gradients` there and back: our prefix is a constant, the baselines have gradients of all keys."""
    query_heads, key_heads, width = heads
    tokens = branches * length

    def inputs() -> Inputs:
        def random(heads: int, count: int) -> torch.Tensor:
            return torch.randn(1, heads, count, width).to(dtype)

        return {
            "query": random(query_heads, tokens),
            "prefix_key": random(key_heads, prefix),
            "prefix_value": random(key_heads, prefix),
            "branch_key": random(key_heads, tokens),
            "branch_value": random(key_heads, tokens),
            "branch_starts": (torch.arange(tokens) // length * length)[None],
        }

    own = branches * length * (length + 1) // 2
    attended = tokens * prefix + own
    elements = 2 * width * (query_heads * tokens + key_heads * (prefix + tokens))
    products = 2 * attended
    wrap = None
    if gradients:
        elements += width * (3 * query_heads * tokens + 2 * key_heads * (prefix + 2 * tokens))
        products += 3 * attended + 2 * own
        wrap = gradients_of
    return Case(
        op="prefix_attention",
        label=f"{branches} x {length} after {prefix}, {query_heads}/{key_heads} x {width}"
        + ", with gradients" * gradients,
        shape={
            "branches": branches,
            "length": length,
            "prefix": prefix,
            "query_heads": query_heads,
            "key_heads": key_heads,
            "width": width,
        },
        dtype=dtype,
        bytes=elements * dtype.itemsize,
        flops=2 * query_heads * width * products,
        inputs=inputs,
        providers=(
            ours("prefix_attention", wrap),
            *(
                Provider(name, wrap(function) if wrap else function, prepare=packed)
                for name, function in (("sdpa, repeat_kv", sdpa_repeat_kv), ("sdpa, enable_gqa", sdpa_gqa))
            ),
            *libraries,
        ),
        **flags,
    )


SMALL = case(3, 4, 10, torch.float32, (4, 2, 16))

CASES = [
    case(30, 1, 256, torch.float32, quick=True),
    case(30, 1, 2048, torch.float32, shown=True, memory=True),
    case(8, 32, 512, torch.float32, shown=True),
    case(8, 32, 2048, torch.float32, memory=True),
    case(25, 4, 1024, torch.float32, (8, 2, 64)),
    case(30, 1, 2048, torch.bfloat16, shown=True),
    case(8, 32, 2048, torch.bfloat16, memory=True),
    case(1, 8, 160, torch.float32, (8, 8, 64), gradients=True),
    case(8, 32, 512, torch.float32, gradients=True, shown=True),
    case(8, 32, 512, torch.bfloat16, gradients=True),
]

GPU_CASES = [
    case(30, 1, 2048, torch.bfloat16, libraries=(FLASHINFER,), quick=True, shown=True),
    case(8, 32, 512, torch.bfloat16, libraries=(FLASHINFER,), shown=True),
    case(8, 32, 2048, torch.bfloat16, libraries=(FLASHINFER,)),
]
