"""The entropy_topk of whole rows from those of vocabulary shards, against the same in torch."""

import torch

from benchmarks.registry import Case, Inputs, Provider, compiled, ours
from ggro_kernels import entropy_topk

K = 25


def eager(
    entropy: torch.Tensor,
    logsumexp: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Logsumexp of the shards', entropies weighted by the shards' probabilities, topk of the shards' tops."""
    total = logsumexp.logsumexp(0)
    entropy = ((logsumexp - total).exp() * (entropy + total - logsumexp)).sum(0)
    candidates = values.transpose(0, 1).flatten(1)
    ids = (indices + offsets[:, None, None]).transpose(0, 1).flatten(1)
    top, places = candidates.topk(values.shape[2])
    return entropy, total, top, ids.gather(1, places)


def case(shards: int, rows: int, vocabulary: int, **flags: bool) -> Case:
    def inputs() -> Inputs:
        size = vocabulary // shards
        logits = 3 * torch.randn(rows, shards * size)
        parts = [entropy_topk(part, K) for part in logits.split(size, dim=1)]
        names = ("entropy", "logsumexp", "values", "indices")
        stacked = {name: torch.stack(field) for name, field in zip(names, zip(*parts, strict=True), strict=True)}
        return {**stacked, "offsets": size * torch.arange(shards)}

    read = shards * rows * (8 + 12 * K)
    return Case(
        op="merge_partials",
        label=f"{shards} x {rows}",
        shape={"shards": shards, "rows": rows, "k": K},
        dtype=torch.float32,
        bytes=read + rows * (8 + 12 * K),
        flops=6 * shards * rows + shards * rows * K,
        inputs=inputs,
        providers=(ours("merge_partials"), Provider("eager", eager), compiled(eager)),
        **flags,
    )


SMALL = case(3, 2, 999)

CASES = [case(8, 1, 128256, quick=True), case(8, 64, 128256, shown=True)]

GPU_CASES = [case(8, 1, 128256, quick=True, shown=True), case(8, 64, 128256, shown=True)]
