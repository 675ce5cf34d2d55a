"""`ggro prm`: make a process reward model out of an outcome reward model, by SP-PRM."""

import argparse
import os
from typing import Any

import torch
from safetensors import SafetensorError

from ggro_hf.cli.errors import CommandError, one_line
from ggro_hf.cli.models import check_device, default_device

_STEPS = {
    "data": "read preference pairs, draw the lengths at which they are compared, print statistics",
    "weights": "score the partial responses by the reference model, once",
    "train": "train the reward model on them",
    "agreement": "measure agreement by length before and after, as a table and plots",
}
_SCORING = "Lower batch_tokens, or take a smaller dtype."
_LESS_MEMORY = {
    "data": "",
    "weights": _SCORING,
    "train": "Lower per_device_train_batch_size (and raise gradient_accumulation_steps), set gradient_checkpointing, "
    "or train with [train.lora].",
    "agreement": _SCORING,
}


def register(subparsers: Any) -> None:
    """Add the subcommands."""
    parser = subparsers.add_parser(
        "prm",
        help="make a process reward model",
        description="Make a process reward model out of an outcome reward model (SP-PRM): four steps, one recipe. "
        "A killed step continues when repeated, one that is done is not done again.",
    )
    steps = parser.add_subparsers(required=True, metavar="STEP")
    for step, does in _STEPS.items():
        of_step = steps.add_parser(step, help=does, description=does[0].upper() + does[1:] + ".")
        of_step.add_argument("recipe", metavar="RECIPE.toml", help="see docs/sp-prm.md")
        if step in ("weights", "agreement"):
            of_step.add_argument("--device", default=default_device(), help="default: cuda where available, else cpu")
        of_step.set_defaults(run=run, step=step)


def run(args: argparse.Namespace) -> int:
    """Do the step and print what came of it."""
    try:
        from ggro_hf.training import sp_prm
        from ggro_hf.training.recipe import read_recipe
    except ImportError as error:
        raise CommandError(f"ggro prm needs more packages ({error}); pip install 'ggro-kernels[train]'") from error
    if args.step in ("weights", "agreement"):
        check_device(args.device)
    if args.step != "train" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise CommandError(f"ggro prm {args.step} is for one process; only train may be started by accelerate launch")
    try:
        recipe = read_recipe(args.recipe)
        if args.step == "data":
            text = sp_prm.make_data(recipe)
        elif args.step == "weights":
            text = sp_prm.make_weights(recipe, args.device)
        elif args.step == "train":
            text = sp_prm.train(recipe)
            if torch.distributed.is_initialized():
                # Its threads, left running, abort an interpreter that ends.
                torch.distributed.destroy_process_group()
        else:
            text = sp_prm.measure_agreement(recipe, args.device)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; repeat the command to continue") from None
    except torch.OutOfMemoryError as error:
        raise CommandError(f"{one_line(error)} {_LESS_MEMORY[args.step]}") from error
    except (OSError, ValueError, FloatingPointError, ImportError, SafetensorError) as error:
        raise CommandError(one_line(error)) from error
    if int(os.environ.get("RANK", 0)) == 0:
        print(text)
    return 0
