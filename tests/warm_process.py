"""Commands in processes of their own that need not import everything anew, which takes three seconds of a core each.

They are forked off a server that has imported it once. A test that is about the start of a process or about a launcher
starts a real `python -m fedpeft_dist` instead.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PRELOADED = [
    "fedpeft_dist.cli",
    "fedpeft_dist.federation.run",
    "tensorboard.summary.writer.event_file_writer",
]


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def fedpeft() -> None:
    """The console script's function. It is imported in the process that runs it."""
    from fedpeft_dist.__main__ import main

    main()


def warm_context() -> multiprocessing.context.BaseContext:
    """For processes of multiprocessing's own that are forked off the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class WarmProcess:
    """A Python function that runs as a command: in a folder, with arguments and variables of its own."""

    def __init__(
        self,
        main: Callable[[], None],
        folder: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        stdout: str | None = None,
    ):
        # They live as long as this object.
        self._files = [tempfile.NamedTemporaryFile() for _ in ("stdout", "stderr")]  # noqa: SIM115
        out, err = (file.name for file in self._files)
        streams = (os.devnull, stdout or out, err)
        self.process = warm_context().Process(
            target=_run, args=(main, str(folder), arguments, environment or {}, streams), daemon=True
        )
        self.process.start()

    @property
    def is_running(self) -> bool:
        return self.process.exitcode is None

    @property
    def output(self) -> str:
        """What it has printed so far on stdout, then on stderr."""
        return "".join(self._read())

    def wait(self, timeout: float = 300) -> int | None:
        """Waits for the end, but no longer than that; returns the exit code of a process that has ended."""
        self.process.join(timeout)
        return self.process.exitcode

    def finish(self, timeout: float = 300) -> Finished:
        """Waits for the end. A process that takes longer is killed."""
        self.wait(timeout)
        self.kill()
        return Finished(self.process.exitcode, *self._read())

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def __enter__(self) -> WarmProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _read(self) -> list[str]:
        return [Path(file.name).read_text() for file in self._files]


class WarmRanks:
    """The same command on one rank or more, without an agent, as srun starts it. Leaving the context kills them all."""

    def __init__(self, num_ranks: int, folder: Path, *arguments: str, main: Callable[[], None] = fedpeft):
        self.ranks = [WarmProcess(main, folder, arguments, variables) for variables in variables_of_ranks(num_ranks)]

    @property
    def is_running(self) -> bool:
        return all(rank.is_running for rank in self.ranks)

    @property
    def output(self) -> str:
        return "".join(rank.output for rank in self.ranks)

    def finish(self, timeout: float = 300) -> list[Finished]:
        deadline = time.monotonic() + timeout
        return [rank.finish(max(0.0, deadline - time.monotonic())) for rank in self.ranks]

    def __enter__(self) -> WarmRanks:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()


def variables_of_ranks(num_ranks: int) -> list[dict[str, str]]:
    """The environment variables that tell each rank of its group. A process that is alone has none."""
    if num_ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def run_fedpeft(folder: Path, *arguments: str, timeout: float = 300, stdout: str | None = None) -> Finished:
    """Runs the command in a folder to its end. `stdout` names a file to print to instead of what is returned."""
    return WarmProcess(fedpeft, folder, arguments, stdout=stdout).finish(timeout)


def _run(
    main: Callable[[], None],
    folder: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    streams: Sequence[str],
) -> None:
    for number, name in enumerate(streams):
        os.dup2(os.open(name, os.O_RDWR), number)
    os.chdir(folder)
    os.environ |= environment
    sys.argv = ["fedpeft", *arguments]
    main()
