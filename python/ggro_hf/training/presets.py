"""Hyperparameters of SP-PRM's paper, as arguments of HuggingFace's Trainer."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Full fine-tuning with AdamW, one epoch, linear decay, no warm-up, no weight decay; ZeRO-3 is a matter of the launch.
_PAPER: dict[str, Any] = {
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "bf16": True,
    "gradient_checkpointing": True,
    "per_device_train_batch_size": 1,
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # The paper's batches are of 64, 32 and unstated partial pairs. Ours are of pairs with all their comparisons,
        # 6.5 of them on average: 10 pairs are 65, 5 are 32.
        "deberta-v3-large": {**_PAPER, "learning_rate": 1e-6, "gradient_accumulation_steps": 10},
        "rm-gemma-2b": {**_PAPER, "learning_rate": 5e-6, "gradient_accumulation_steps": 5},
        "rm-llama-3.2-3b": {**_PAPER, "learning_rate": 5e-6, "gradient_accumulation_steps": 5},
    }
)
"""By the names of the reward models that the paper trains; on one process, to be divided by their number."""
