"""The command line: ``fastcl info`` and ``fastcl train METHOD``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

import fastcl

# the name in --batch-size or --batch-size=64, which jsonargparse spells like the Python parameter
_OPTION = re.compile(r"(?<=^--)[^=]+")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ``arguments`` are those of the process by default."""
    parser = argparse.ArgumentParser("fastcl", description="Contrastive losses as fused kernels for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastcl {fastcl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="which backends are available here, and why the others are not")
    commands.add_parser("train", help="train an encoder; 'fastcl train --help' lists methods", add_help=False)
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "train":
        _train(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        fastcl.show_config()


def _train(arguments: Sequence[str]) -> None:
    try:
        import jsonargparse

        from fastcl.train import simclr

        run = jsonargparse.auto_cli(
            {"simclr": simclr},
            args=[_OPTION.sub(lambda option: option[0].replace("-", "_"), text) for text in arguments],
            prog="fastcl train",
            exit_on_error=False,
        )
    except (argparse.ArgumentError, ValueError, ModuleNotFoundError) as error:
        print(f"fastcl train: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    run.fit()
