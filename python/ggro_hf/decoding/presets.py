"""Settings under names: the released tasks, and those that the review page mentions."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Preset:
    """GGRO settings and where they come from; `prefill_attack` says that the task's prompts open the answer."""

    source: str
    max_new_tokens: int
    entropy_threshold: float
    refinements: int = 8
    candidates: int = 25
    check_every: int = 1
    nudge_tokens: int = 1
    perplexity_ratio: float | None = None
    prefill_attack: bool = False


_RELEASED = "released GGRO code, configuration of {task} for the {size} pair"

# task: (max_new_tokens, entropy threshold, refinements of the 8B pair, of the 3B pair, prefill attack)
_TASKS = {
    "hex-phi": (256, 1.5, 8, 8, True),
    "xstest": (256, 1.5, 8, 8, False),
    "hh-rlhf": (128, 1.5, 8, 3, False),
    "arc-challenge": (1024, 2.0, 8, 3, False),
    "mmlu-pro": (1024, 2.0, 8, 8, False),
}


def _released_presets() -> dict[str, Preset]:
    presets = {}
    for task, (max_new_tokens, threshold, refinements_8b, refinements_3b, prefill) in _TASKS.items():
        for size, refinements in (("8b", refinements_8b), ("3b", refinements_3b)):
            presets[f"{task}-{size}"] = Preset(
                source=_RELEASED.format(task=task, size=size.upper()),
                max_new_tokens=max_new_tokens,
                entropy_threshold=threshold,
                refinements=refinements,
                prefill_attack=prefill,
            )
    return presets


PRESETS: dict[str, Preset] = {
    **_released_presets(),
    "review": Preset(
        source="the paper's review page (machine-written), not the released code; the ratio is ours",
        max_new_tokens=256,
        entropy_threshold=2.5,
        check_every=5,
        nudge_tokens=3,
        perplexity_ratio=1.5,
    ),
}
