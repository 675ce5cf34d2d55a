"""How much each comparison of partial responses counts: by what a reference reward model makes of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ggro_hf.pairs import PairRewards, PartialPair
from ggro_kernels import binary_entropy_weight

Mode = Literal["reference", "mask", "none"]

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class WeighedPair:
    """A pair, those of its lengths that count, and how much each does."""

    partial: PartialPair
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Weighting:
    """How the margin `r(chosen) - r(rejected)` of the reference model becomes the weight of a comparison.

    Args:
        mode: "reference" is the paper's: `1 / H(sigmoid(margin))` where the reference model prefers the chosen partial
            response, else the comparison is left out. "mask" leaves out the same and weighs the rest equally, which is
            what the released code trains with: its weights never reach the loss. "none" is the ablation, for which
            every comparison counts 1.
        clamp: the largest weight, of a margin of about 6.6 where it is 100; None for the bare formula.
        normalise: divide the weights by their mean, so that the learning rate means the same in every mode.

    Raises ValueError for another mode or a clamp that is not positive.

    Source: SP-PRM, weighted preference loss and its ablation; the paper states neither a clamp nor a normalisation.
    """

    mode: Mode = "reference"
    clamp: float | None = 100.0
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is {self.mode!r}, but must be one of {', '.join(map(repr, get_args(Mode)))}")
        if self.clamp is not None and not 0 < self.clamp <= _LARGEST:
            raise ValueError(f"clamp is {self.clamp}, but must be a positive number, or None for no clamp")


def weigh(
    weighting: Weighting, rewards: Mapping[int, PairRewards] | None, partials: Sequence[PartialPair]
) -> list[WeighedPair]:
    """The comparisons that count, pair by pair, and their weights; a pair none of whose comparisons counts is left out.

    `rewards` are the reference model's, by row; "none" needs none. A tie is no preference: it does not count.

    Raises ValueError, the row named, where rewards are missing, are of other lengths or no numbers, or where a weight
    exceeds fp32, which a clamp prevents.
    """
    if weighting.mode == "none":
        return [WeighedPair(partial, (1.0,) * len(partial.lengths)) for partial in partials if partial.lengths]
    if rewards is None:
        raise ValueError(f"rewards is None, but mode {weighting.mode!r} needs those of a reference model")
    weighed = []
    for partial in partials:
        margins = torch.tensor(_margins(rewards, partial), dtype=torch.float64)
        weights = (
            (margins > 0).double()
            if weighting.mode == "mask"
            else binary_entropy_weight(margins, clamp=weighting.clamp)
        ).tolist()
        kept = [(length, weight) for length, weight in zip(partial.lengths, weights, strict=True) if weight > 0]
        for length, weight in kept:
            if weight > _LARGEST:
                raise ValueError(
                    f"row {partial.pair.row}: the weight {_where(length)} exceeds fp32; set a clamp, such as 100"
                )
        if kept:
            lengths, own = zip(*kept, strict=True)
            weighed.append(WeighedPair(PartialPair(partial.pair, lengths), own))
    return _normalised(weighed) if weighting.normalise else weighed


def weight_statistics(partials: Sequence[PartialPair], weighed: Sequence[WeighedPair]) -> dict[str, Any]:
    """What a weighting left of the comparisons, in plain values.

    "pairs" and "comparisons" with "kept" of each; "mean_weight" and "max_weight" over what is kept, None where nothing
    is; "by_length": the same for lengths 1, 2, 3-4, 5-8 and so on, then for finished responses.
    """
    of_all = [length for partial in partials for length in partial.lengths]
    of_kept = [pair for item in weighed for pair in zip(item.partial.lengths, item.weights, strict=True)]
    buckets = sorted({_bucket(length) for length in of_all})
    return {
        "pairs": {"all": len(partials), "kept": len(weighed)},
        **_share(len(of_all), [weight for _, weight in of_kept]),
        "by_length": {
            _bucket_name(bucket): _share(
                sum(_bucket(length) == bucket for length in of_all),
                [weight for length, weight in of_kept if _bucket(length) == bucket],
            )
            for bucket in buckets
        },
    }


def format_weight_statistics(statistics: Mapping[str, Any]) -> str:
    """`weight_statistics` as a text table."""
    pairs = statistics["pairs"]
    lines = [
        f"{pairs['kept']} of {pairs['all']} pairs have a comparison that counts",
        f"{'length':>12} {'comparisons':>12} {'kept':>8} {'share':>8} {'mean weight':>12} {'max weight':>12}",
    ]
    for name, row in [*statistics["by_length"].items(), ("all", statistics)]:
        comparisons = row["comparisons"]
        share = f"{100 * comparisons['kept'] / comparisons['all']:.1f} %" if comparisons["all"] else "-"
        weights = ["-" if row[key] is None else f"{row[key]:.4g}" for key in ("mean_weight", "max_weight")]
        lines.append(
            f"{name:>12} {comparisons['all']:>12} {comparisons['kept']:>8} {share:>8} {weights[0]:>12} {weights[1]:>12}"
        )
    return "\n".join(lines)


def _margins(rewards: Mapping[int, PairRewards], partial: PartialPair) -> list[float]:
    row = partial.pair.row
    own = rewards.get(row)
    if own is None:
        raise ValueError(f"row {row} has no rewards of the reference model; score it with `ggro prm weights`")
    if not own.lengths == partial.lengths or not len(own.chosen) == len(own.rejected) == len(partial.lengths):
        raise ValueError(
            f"row {row}: {len(own.chosen)} chosen and {len(own.rejected)} rejected rewards at lengths "
            f"{list(own.lengths)}, but the data has the lengths {list(partial.lengths)}; score it anew"
        )
    for length, chosen, rejected in zip(own.lengths, own.chosen, own.rejected, strict=True):
        if not (math.isfinite(chosen) and math.isfinite(rejected)):
            raise ValueError(
                f"row {row}: the rewards {_where(length)} are {chosen} and {rejected}, "
                "but must be finite numbers; score it anew"
            )
    return [chosen - rejected for chosen, rejected in zip(own.chosen, own.rejected, strict=True)]


def _normalised(weighed: list[WeighedPair]) -> list[WeighedPair]:
    weights = [weight for item in weighed for weight in item.weights]
    mean = math.fsum(weights) / len(weights) if weights else 1.0
    return [WeighedPair(item.partial, tuple(weight / mean for weight in item.weights)) for item in weighed]


def _where(length: int | None) -> str:
    return "of the finished responses" if length is None else f"at length {length}"


def _share(comparisons: int, weights: list[float]) -> dict[str, Any]:
    return {
        "comparisons": {"all": comparisons, "kept": len(weights)},
        "mean_weight": math.fsum(weights) / len(weights) if weights else None,
        "max_weight": max(weights, default=None),
    }


def _bucket(length: int | None) -> float:
    """The exponent of the power of two that ends the length's bucket, infinity for finished responses."""
    return math.inf if length is None else (length - 1).bit_length()


def _bucket_name(bucket: float) -> str:
    if bucket == math.inf:
        return "finished"
    last = 2 ** int(bucket)
    first = last // 2 + 1
    return str(last) if first >= last else f"{first}-{last}"
