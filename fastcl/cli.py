"""The command line: ``fastcl info``, ``fastcl train METHOD`` and ``fastcl export``."""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import fastcl


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ``arguments`` are those of the process by default."""
    parser = argparse.ArgumentParser("fastcl", description="Contrastive losses as fused kernels for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastcl {fastcl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="which backends are available here, and why the others are not")
    commands.add_parser("train", help="train an encoder; 'fastcl train --help' lists methods", add_help=False)
    exported = commands.add_parser("export", help="write a checkpoint's encoder as a torchvision state_dict")
    exported.add_argument(
        "checkpoint", type=Path, help="written by fastcl train, with one of torchvision's ResNets"
    )
    exported.add_argument("out", type=Path, help="the file to write")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "train":
        _train(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif chosen.command == "export":
        _export(chosen.checkpoint, chosen.out)
    else:
        fastcl.show_config()


@contextmanager
def _imports() -> Iterator[None]:
    """Makes objects by the million, none of them garbage, which the collector need not look at."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _train(arguments: Sequence[str]) -> None:
    try:
        with _imports():
            from fastcl.train.methods import METHODS
            from fastcl.train.options import parse
            from fastcl.train.run import prepare
            from fastcl.train.stopping import RunStoppedError

        width = 2 + max(map(len, METHODS))
        parser = argparse.ArgumentParser(
            "fastcl train",
            description="Train an encoder. 'fastcl train METHOD --help' lists the method's options.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            exit_on_error=False,
            epilog="methods:\n" + "\n".join(f"  {name:{width}} {x.summary}" for name, x in METHODS.items()),
        )
        parser.add_argument("method", choices=METHODS, metavar="METHOD", help="one of those below")
        method = parser.parse_args(arguments[:1]).method  # what follows is the method's own, --help too
        run = prepare(method, **parse(method, arguments[1:]))
        try:
            run.fit()
        except RunStoppedError as stop:
            _stop(stop)
    except KeyboardInterrupt:
        _stop("stopped by SIGINT")
    except (argparse.ArgumentError, ValueError, ModuleNotFoundError) as error:
        _fail("train", error)


def _export(checkpoint: Path, out: Path) -> None:
    try:
        with _imports():
            from fastcl.train import export

        print(export(checkpoint, out))
    except (ValueError, ModuleNotFoundError) as error:
        _fail("export", error)


def _stop(why: object) -> None:
    """An interrupt that is repeated would fill the rest of the process with tracebacks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _fail("train", why, status=1)


def _fail(command: str, error: object, *, status: int = 2) -> None:
    print(f"fastcl {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)
