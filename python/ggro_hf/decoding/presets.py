"""Settings under names, each with where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings of a decoder: arguments of the class named `method`, and the response length they go with, if any."""

    method: str
    source: str
    settings: Mapping[str, Any]
    max_new_tokens: int | None = None


_RELEASED = "released GGRO code, configuration of {task} for the {size} pair"

# task: (max_new_tokens, entropy threshold, refinements of the 8B pair, of the 3B pair, prefill attack)
_TASKS = {
    "hex-phi": (256, 1.5, 8, 8, True),
    "xstest": (256, 1.5, 8, 8, False),
    "hh-rlhf": (128, 1.5, 8, 3, False),
    "arc-challenge": (1024, 2.0, 8, 3, False),
    "mmlu-pro": (1024, 2.0, 8, 8, False),
}


def _released_ggro() -> dict[str, Preset]:
    presets = {}
    for task, (max_new_tokens, threshold, refinements_8b, refinements_3b, prefill) in _TASKS.items():
        for size, refinements in (("8b", refinements_8b), ("3b", refinements_3b)):
            settings = {"entropy_threshold": threshold, "refinements": refinements, "candidates": 25}
            # The task's prompts open the answer.
            if prefill:
                settings["insertion_offset"] = 0
            source = _RELEASED.format(task=task, size=size.upper())
            presets[f"{task}-{size}"] = Preset("GGRO", source, settings, max_new_tokens)
    return presets


_SP_PRM = "SP-PRM paper, comparison of decoders"
_BEAMS = {"width": 8, "successors": 8, "temperature": 1.0, "top_k": 50}
_CARDS = {"entropy_threshold": 3.0, "alpha": 0.5, "temperature": 0.7, "top_k": 40, "max_segment": 64, "attempts": 20}

PRESETS: dict[str, Preset] = {
    **_released_ggro(),
    "review": Preset(
        "GGRO",
        "the paper's review page (machine-written), not the released code; the ratio is ours",
        {
            "entropy_threshold": 2.5,
            "refinements": 8,
            "candidates": 25,
            "check_every": 5,
            "nudge_tokens": 3,
            "perplexity_ratio": 1.5,
        },
        256,
    ),
    "args-paper": Preset("ARGS", _SP_PRM, {"weight": 1.5, "candidates": 30}),
    "args-released": Preset("ARGS", "released ARGS code", {"weight": 1.5, "candidates": 10, "as_released": True}, 128),
    "args-sp-prm": Preset("ARGS", "released SP-PRM code, command line", {"weight": 1.0, "candidates": 10}),
    "cbs-paper": Preset("ChunkBeamSearch", _SP_PRM, {**_BEAMS, "chunk_length": 30}),
    "tbs-paper": Preset("ChunkBeamSearch", _SP_PRM, {**_BEAMS, "chunk_length": 1}),
    "cbs-sp-prm": Preset(
        "ChunkBeamSearch",
        "released SP-PRM code, command line",
        {**_BEAMS, "width": 2, "successors": 2, "chunk_length": 30, "as_released": True},
    ),
    "cbs-weak-to-strong": Preset(
        "ChunkBeamSearch",
        "released weak-to-strong search code, instruction following",
        {**_BEAMS, "width": 2, "successors": 2, "chunk_length": 10, "temperature": 0.7, "as_released": True},
        2048,
    ),
    "cards-paper": Preset(
        "CARDS", _SP_PRM, {**_CARDS, "entropy_threshold": 7.0, "top_k": 30, "attempts": 10, "reward_threshold": 8.0}
    ),
    "cards-released": Preset(
        "CARDS", "released CARDS code", {**_CARDS, "reward_threshold": 8.5, "as_released": True}, 128
    ),
    "rs-released": Preset(
        "RejectionSampling",
        "released CARDS code, item level",
        {"temperature": 0.7, "top_k": 40, "attempts": 20, "reward_threshold": 8.5},
        128,
    ),
    **{
        f"bon-{samples}": Preset(
            "BestOfN", _SP_PRM, {"samples": samples, "temperature": 1.0, "top_k": 50, "top_p": None}
        )
        for samples in (8, 16, 64)
    },
}


def preset_settings(name: str, method: str) -> dict[str, Any]:
    """The settings of a preset of that method. Raises ValueError where there is none of the name."""
    names = [known for known, preset in PRESETS.items() if preset.method == method]
    if name not in names:
        raise ValueError(f"preset {name!r} is unknown to {method}; there are {', '.join(names) or 'none'}")
    return dict(PRESETS[name].settings)
