"""Processes for tests: forked from a server that has imported what takes seconds and runs no threads."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from fastcl.cli import main

_T = TypeVar("_T")


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "fastcl.train"])
    return context


def on_every_rank(checks: Sequence[Callable[[object], None]], world: int, folder: Path) -> None:
    """Call each of ``checks`` with the group of ``world`` new processes, in each of them."""
    _server()
    arguments = (world, f"{folder}/rendezvous", checks)
    multiprocessing.start_processes(_on_rank, arguments, nprocs=world, start_method="forkserver")


def _on_rank(rank: int, world: int, file: str, checks: Sequence[Callable[[object], None]]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    for check in checks:
        check(dist.group.WORLD)
    dist.destroy_process_group()


def in_a_process(function: Callable[..., _T], *arguments: object) -> _T:
    """What ``function(*arguments)`` returns in a process of its own."""
    receiver, sender = _server().Pipe(duplex=False)
    process = _server().Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()  # so that a process that dies ends the wait
    returned: _T = receiver.recv()
    process.join()
    return returned


def _send(sender: Connection, function: Callable[..., object], arguments: Sequence[object]) -> None:
    sender.send(function(*arguments))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Command:
    """``fastcl ARGUMENTS`` in ``ranks`` processes of one thread each, as a launcher would start them."""

    def __init__(self, folder: Path, *arguments: str, ranks: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._texts = [(folder / f"{rank}.out", folder / f"{rank}.err") for rank in range(ranks)]
        for text in (text for texts in self._texts for text in texts):
            text.touch()
        cluster = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
        self._processes = [
            _server().Process(
                target=_run_command,
                args=(arguments, texts, cluster | {"LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            )
            for rank, texts in enumerate(self._texts)
        ]
        for process in self._processes:
            process.start()

    def send_signal(self, number: int) -> None:
        for process in self._processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def lines(self) -> Iterator[str]:
        """What the first rank prints, as it comes."""
        with self._texts[0][0].open() as file:
            ends = False
            while True:
                line = file.readline()
                if line:
                    yield line
                elif ends:
                    return
                else:
                    ends = not self._processes[0].is_alive()
                    time.sleep(0.01)

    def wait(self) -> tuple[int | None, str]:
        """The first status that is not 0, and all that was printed to stderr."""
        for process in self._processes:
            process.join(240)
        codes = [process.exitcode for process in self._processes]
        return next((code for code in codes if code != 0), 0), "".join(e.read_text() for _, e in self._texts)


def _run_command(arguments: Sequence[str], texts: Sequence[Path], environment: dict[str, str]) -> None:
    for number, path in enumerate(texts, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ |= environment
    torch.set_num_threads(1)
    main(arguments)
