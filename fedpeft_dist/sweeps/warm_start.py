"""Cells' processes that need no imports, which take seconds of a core each: they are forked off a server.

The server has imported everything once, with one thread and without touching CUDA. It forks a process for each line
that it reads, and answers with its number. Each process becomes a child of the launcher, which therefore learns how it
ended, can send it signals, and leaves it running if the launcher itself is killed.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

PRELOADED = ("fedpeft_dist.cli", "fedpeft_dist.federation.run", "torch._dynamo", "torch.utils.tensorboard")
SET_NAME, SET_SUBREAPER = 15, 36
"""Numbers of prctl's options."""


class Process(Protocol):
    """A process that was started, as subprocess describes it."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def terminate(self) -> None: ...


def start_plainly(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """A session of its own, because a terminal sends Ctrl-C to all foreground processes. The launcher decides which
    cells stop.
    """
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "fedpeft_dist", *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class WarmServer:
    """A context manager. Where it cannot serve, processes are started plainly."""

    def __init__(self, modules: Sequence[str] = ()):
        self.modules = (*PRELOADED, *modules)
        self._server: subprocess.Popen[bytes] | None = None

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
        """Starts `fedpeft ARGUMENTS` on the cores of the calling thread; it appends to the log."""
        affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        request = {"arguments": arguments, "environment": dict(environment), "log": str(log), "cpus": affinity}
        try:
            server = self._begin(environment)
            server.stdin.write(json.dumps(request).encode() + b"\n")
            server.stdin.flush()
            return _Forked(int(server.stdout.readline()))
        except (OSError, ValueError):  # there is no server, or it has ended
            return start_plainly(arguments, environment, log)

    def _begin(self, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        if self._server is None:
            if sys.platform != "linux" or ctypes.CDLL(None).prctl(SET_SUBREAPER, 1) != 0:
                raise OSError("orphans of the server do not become children of this process")
            command = [sys.executable, "-m", __name__, *self.modules]
            # OpenMP reads its variables once, when it is loaded.
            threads = {key: value for key, value in environment.items() if key == "OMP_NUM_THREADS"}
            self._server = subprocess.Popen(
                command,
                env={**os.environ, **threads},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._server

    def __enter__(self) -> "WarmServer":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._server is not None:
            with suppress(OSError):
                self._server.stdin.close()
            self._server.kill()
            self._server.wait()
            self._server.stdout.close()
            ctypes.CDLL(None).prctl(SET_SUBREAPER, 0)


class _Forked:
    """A child of this process that this process has not forked itself."""

    def __init__(self, pid: int):
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        return self._wait(0)

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, 15)

    def _wait(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


def serve(modules: Sequence[str]) -> None:
    """The server's life: it ends when the launcher has closed its pipe, or has died."""
    for module in modules:
        with suppress(ImportError):  # the cell that needs it says so
            importlib.import_module(module)
    assert threading.active_count() == 1, "a fork copies one thread only"
    gc.freeze()  # the collector of a cell would write to all that they share, and so copy it
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    while line := requests.readline():
        told, tell = os.pipe()
        middle = os.fork()
        if middle == 0:
            try:
                child = os.fork()
            except OSError:  # the launcher hears of no number, and starts the cell plainly
                os._exit(1)
            if child:
                os._exit(0)  # its child becomes the launcher's
            os.setsid()
            os.write(tell, str(os.getpid()).encode() + b"\n")
            for descriptor in (told, tell, answers):
                os.close(descriptor)
            requests.close()
            _become(**json.loads(line))
        os.waitpid(middle, 0)
        os.close(tell)
        os.write(answers, os.read(told, 32) or b"\n")
        os.close(told)


def _become(arguments: Sequence[str], environment: Mapping[str, str], log: str, cpus: Sequence[int]) -> NoReturn:
    """Runs the command in this process, and ends it without freeing what it shares with the server."""
    if cpus:
        os.sched_setaffinity(0, cpus)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(descriptor, number)
    os.environ |= environment
    sys.argv = ["fedpeft", *arguments]
    ctypes.CDLL(None).prctl(SET_NAME, f"cell {arguments[arguments.index('--index') + 1]}".encode())
    code: Any = 1
    try:
        runpy.run_module("fedpeft_dist", run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(sys.argv[1:])
