"""The `ggro` command."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from transformers.utils import logging as transformers_logging

from ggro_hf.cli import bench, demo, doctor, generate, prm, train_demo
from ggro_hf.cli.errors import CommandError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code.

    0: done. 1: done, but some input lines failed, or a check did. 2: nothing done, the message on stderr says why.
    130: stopped by Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="ggro", description="Reward-guided decoding on HuggingFace models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (generate, demo, doctor, bench, prm, train_demo):
        command.register(subparsers)
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return args.run(args)
    except CommandError as error:
        print(f"ggro: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\nggro: stopped{interrupt}", file=sys.stderr)
        return 130


def _version() -> str:
    try:
        return version("ggro-kernels")
    except PackageNotFoundError:
        return "(not installed)"
