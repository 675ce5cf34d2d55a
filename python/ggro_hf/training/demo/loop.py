"""What the demo models' training runs share: optimizers, schedule, a loop that survives a kill, causal attention."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import repeat_kv

CAUSAL_ATTENTION = "ggro_causal_training"


def _causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention that ignores padding (on the right it does no harm).

    The sdpa attention of a traced model gets a dense mask instead, which makes a training step a third slower.
    """
    groups = query.shape[1] // key.shape[1]
    output = nn.functional.scaled_dot_product_attention(
        query, repeat_kv(key, groups), repeat_kv(value, groups), dropout_p=dropout, scale=scaling, is_causal=True
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(CAUSAL_ATTENTION, _causal_attention)


def make_optimizers(
    model: nn.Module, matrix_lr: float, other_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for embedding, norms and head."""
    layers: nn.Module = model.get_submodule("model.layers")
    matrices = [parameter for parameter in layers.parameters() if parameter.ndim == 2]
    known = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [
        torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def trapezoid(step: int, steps: int, warmup: int, decay: int) -> float:
    """Learning-rate factor: linear warm-up, constant, linear decay to zero over the last `decay` steps."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay))


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic algorithms, also in code compiled meanwhile: its embedding gradient otherwise adds in any order."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def train_resumably(
    name: str,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss_of_step: Callable[[int], torch.Tensor],
    rate_of_step: Callable[[int], float],
    steps: int,
    checkpoint: Path,
    fingerprint: str,
    checkpoint_every: int,
    progress_row: int = 0,
) -> float:
    """Run `steps` optimizer steps, continuing from `checkpoint` where it exists; returns the seconds spent.

    `loss_of_step` must depend on the step number and the weights only: then a killed run that continues ends with the
    same weights as one that was never killed.

    Raises:
        ValueError: the checkpoint was written under other settings.
    """
    first, spent = 0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["fingerprint"] != fingerprint:
            raise ValueError(
                f"{checkpoint} belongs to a run with other settings or data; use another work directory or delete it"
            )
        first, spent = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    peaks = [[group.setdefault("peak_lr", group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]

    def save(step: int, seconds: float) -> None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = checkpoint.with_suffix(".partial")
        torch.save(
            {
                "fingerprint": fingerprint,
                "step": step,
                "seconds": seconds,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            },
            partial,
        )
        os.replace(partial, checkpoint)

    model.train()
    start = time.monotonic() - spent
    smoothed: float | None = None
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, position=progress_row, mininterval=2.0)
    with _deterministic():
        for step in bar:
            rate = rate_of_step(step)
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = peak * rate
            loss = loss_of_step(step)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            smoothed = loss.item() if smoothed is None else 0.98 * smoothed + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smoothed:.3f}", refresh=False)
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                save(step + 1, time.monotonic() - start)
    return time.monotonic() - start
