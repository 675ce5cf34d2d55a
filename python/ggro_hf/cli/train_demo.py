"""`ggro train-demo`: train the embedded demo models from film reviews."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ggro_hf.cli.errors import CommandError
from ggro_hf.training.demo.models import DemoRecipe, train_demo


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "train-demo",
        help="train the embedded demo models",
        description="Train tokenizer, policy, reward and gold model on film reviews. A killed run continues.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="holds train.jsonl.gz and val.jsonl.gz (text, label)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets policy/, reward/ and gold/")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="checkpoints (default: OUTPUT.work)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="without torch.compile: slower, needs no C++ compiler")


def run(args: argparse.Namespace) -> int:
    """Train, then print the measurements as JSON."""
    work_dir = args.work_dir or args.output.with_name(args.output.name + ".work")
    try:
        report = train_demo(args.data, args.output, work_dir, args.seed, DemoRecipe(compiled=not args.eager))
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(str(error)) from error
    print(json.dumps(asdict(report), indent=2))
    return 0
