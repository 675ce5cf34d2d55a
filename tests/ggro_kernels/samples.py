"""One entry per op: what the tests that hold for every op call it with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ggro_kernels import (
    batch_invariant_linear,
    candidate_scores,
    entropy_topk,
    lm_head_entropy_topk,
    merge_partials,
    prefix_attention,
    project_topk,
    score_select,
    weighted_bt_loss,
)


@dataclass(frozen=True)
class OpSample:
    """A public function and arguments for it."""

    function: Callable[..., Any]
    arguments: dict[str, Any]


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def _ids(vocab: int, *shape: int) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(vocab))


def _partials(shards: int, rows: int, k: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    parts = [entropy_topk(_normal(rows, 50 + i, dtype=dtype), k) for i in range(shards)]
    names = ("entropy", "logsumexp", "values", "indices")
    stacked = {name: torch.stack([getattr(part, name) for part in parts]) for name in names}
    return {**stacked, "offsets": 100 * torch.arange(shards).flip(0)}


def _pairs(
    rows: int, lengths: tuple[int, int], pairs: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    return {
        "chosen_rewards": _normal(rows, lengths[0], dtype=dtype),
        "rejected_rewards": _normal(rows, lengths[1], dtype=dtype),
        "chosen_positions": _ids(lengths[0], rows, pairs),
        "rejected_positions": _ids(lengths[1], rows, pairs),
        "weights": _normal(rows, pairs).relu(),
    }


def _attention(
    query_heads: int, key_heads: int, prefix: int, branches: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Two rows of ragged branches, keys and values as slices of one cache, as a model has them."""
    tokens, width = sum(branches), 24
    key, value = (_normal(2, key_heads, prefix + tokens, width, dtype=dtype) for _ in range(2))
    starts = [sum(branches[:index]) for index, length in enumerate(branches) for _ in range(length)]
    return {
        "query": _normal(2, tokens, query_heads, width, dtype=dtype).transpose(1, 2),
        "prefix_key": key[:, :, :prefix],
        "prefix_value": value[:, :, :prefix],
        "branch_key": key[:, :, prefix:],
        "branch_value": value[:, :, prefix:],
        "branch_starts": torch.tensor(starts, dtype=torch.int64).expand(2, tokens),
    }


def _samples() -> dict[str, OpSample]:
    bf16, fp64 = torch.bfloat16, torch.float64
    return {
        "batch_invariant_linear fp32": OpSample(
            batch_invariant_linear, {"x": _normal(7, 1376), "weight": _normal(512, 1376)}
        ),
        "batch_invariant_linear bf16 with a bias, strides and more dimensions": OpSample(
            batch_invariant_linear,
            {
                "x": _normal(2, 3, 100, dtype=bf16)[..., ::2],
                "weight": _normal(33, 60, dtype=bf16)[:, :50],
                "bias": _normal(33, dtype=bf16),
            },
        ),
        "batch_invariant_linear one row": OpSample(
            batch_invariant_linear, {"x": _normal(130), "weight": _normal(130, 4000).t()}
        ),
        "batch_invariant_linear no rows": OpSample(
            batch_invariant_linear, {"x": _normal(0, 33), "weight": _normal(50, 33)}
        ),
        "batch_invariant_linear fp64": OpSample(
            batch_invariant_linear, {"x": _normal(2, 10, dtype=fp64), "weight": _normal(3, 10, dtype=fp64)}
        ),
        "candidate_scores fp32": OpSample(
            candidate_scores, {"gradient": _normal(4, 33), "table": _normal(50, 33), "ids": _ids(50, 4, 5)}
        ),
        "candidate_scores mixed dtypes": OpSample(
            candidate_scores,
            {"gradient": _normal(20, 300), "table": _normal(500, 300, dtype=bf16), "ids": _ids(500, 20, 25)},
        ),
        "candidate_scores no positions": OpSample(
            candidate_scores, {"gradient": _normal(0, 33), "table": _normal(50, 33), "ids": _ids(50, 0, 5)}
        ),
        "entropy_topk fp32": OpSample(entropy_topk, {"logits": _normal(3, 70001), "k": 25}),
        "entropy_topk bf16 with a row stride": OpSample(
            entropy_topk, {"logits": _normal(3, 100, dtype=bf16)[:, :77], "k": 5, "temperature": 0.7}
        ),
        "entropy_topk column stride": OpSample(entropy_topk, {"logits": _normal(100, 3).t(), "k": 2}),
        "entropy_topk no rows": OpSample(entropy_topk, {"logits": _normal(0, 100), "k": 5}),
        "entropy_topk fp64": OpSample(entropy_topk, {"logits": _normal(2, 10, dtype=fp64), "k": 5}),
        "lm_head_entropy_topk fp32": OpSample(
            lm_head_entropy_topk, {"hidden": _normal(3, 65), "weight": _normal(2500, 65), "k": 25}
        ),
        "lm_head_entropy_topk mixed dtypes, every option": OpSample(
            lm_head_entropy_topk,
            {
                "hidden": _normal(14, 300),
                "weight": _normal(257, 300, dtype=bf16),
                "k": 5,
                "bias": _normal(257, dtype=bf16),
                "softcap": 30.0,
                "temperature": 0.7,
            },
        ),
        "lm_head_entropy_topk no rows": OpSample(
            lm_head_entropy_topk, {"hidden": _normal(0, 33), "weight": _normal(50, 33), "k": 5}
        ),
        "lm_head_entropy_topk fp64": OpSample(
            lm_head_entropy_topk, {"hidden": _normal(2, 33, dtype=fp64), "weight": _normal(50, 33), "k": 5}
        ),
        "project_topk fp32": OpSample(project_topk, {"gradient": _normal(20, 65), "table": _normal(2500, 65), "k": 25}),
        "project_topk mixed dtypes, every option": OpSample(
            project_topk,
            {
                "gradient": _normal(14, 300),
                "table": _normal(257, 300, dtype=bf16),
                "k": 5,
                "bias": _normal(257, dtype=bf16),
                "forbidden": _normal(257) > 0,
            },
        ),
        "project_topk column stride": OpSample(
            project_topk, {"gradient": _normal(33, 4).t(), "table": _normal(33, 50).t(), "k": 5}
        ),
        "project_topk no positions": OpSample(
            project_topk, {"gradient": _normal(0, 33), "table": _normal(50, 33), "k": 5}
        ),
        "project_topk fp64": OpSample(
            project_topk, {"gradient": _normal(2, 33), "table": _normal(50, 33, dtype=fp64), "k": 5}
        ),
        "merge_partials fp32": OpSample(merge_partials, _partials(3, 200, 25)),
        "merge_partials bf16, one shard": OpSample(merge_partials, _partials(1, 4, 5, dtype=bf16)),
        "merge_partials no rows": OpSample(merge_partials, _partials(2, 0, 5)),
        "merge_partials fp64": OpSample(merge_partials, _partials(2, 3, 5, dtype=fp64)),
        "score_select greedy": OpSample(
            score_select,
            {"hidden": _normal(3, 30, 1031), "head": _normal(1031), "logits": _normal(3, 30), "weight": 1.5},
        ),
        "score_select categorical, mixed dtypes": OpSample(
            score_select,
            {
                "hidden": _normal(4, 7, 100, dtype=bf16)[..., ::2],
                "head": _normal(50),
                "logits": _normal(4, 7, dtype=torch.float16),
                "weight": 0.5,
                "mode": "categorical",
                "temperature": 0.7,
                "uniforms": torch.tensor([0.0, 0.3, 0.6, 0.99]),
            },
        ),
        "score_select no rows": OpSample(
            score_select, {"hidden": _normal(0, 3, 8), "head": _normal(8), "logits": _normal(0, 3), "weight": 1.0}
        ),
        "weighted_bt_loss fp32": OpSample(weighted_bt_loss, _pairs(30, (70, 50), 500)),
        "weighted_bt_loss bf16, sum": OpSample(
            weighted_bt_loss, {**_pairs(3, (7, 5), 9, dtype=bf16), "reduction": "sum"}
        ),
        "weighted_bt_loss no rows": OpSample(weighted_bt_loss, _pairs(0, (7, 5), 9)),
        "weighted_bt_loss fp64": OpSample(weighted_bt_loss, _pairs(2, (7, 5), 3, dtype=fp64)),
        "prefix_attention fp32": OpSample(prefix_attention, _attention(4, 2, 300, (1, 5, 70))),
        "prefix_attention bf16 with every option": OpSample(
            prefix_attention,
            _attention(6, 1, 100, (3, 1, 4), bf16)
            | {"prefix_lengths": torch.tensor([100, 60]), "scale": 0.3, "softcap": 5.0, "window": 50},
        ),
        "prefix_attention of branches in one buffer": OpSample(
            prefix_attention,
            _attention(4, 2, 70, (9, 1, 20))
            | {
                "query": _normal(2, 4, 3, 24),
                "branch_starts": torch.tensor([[10, 9, 0], [29, 2, 2]]),
                "branch_ends": torch.tensor([[29, 9, 4], [29, 20, 8]]),
                "prefix_lengths": torch.tensor([70, 33]),
            },
        ),
        "prefix_attention no prefix": OpSample(prefix_attention, _attention(2, 2, 0, (9,))),
        "prefix_attention no tokens": OpSample(prefix_attention, _attention(2, 2, 30, ())),
        "prefix_attention fp64": OpSample(prefix_attention, _attention(2, 1, 10, (2, 3), fp64)),
    }


SAMPLES = _samples()
