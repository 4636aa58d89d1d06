"""Commands of fedpeft in processes of their own that need not import everything anew, which takes seconds.

They are forked off a server that has imported it once. What a test kills, signals or starts under a launcher is a real
`python -m fedpeft_dist` in its place.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PRELOADED = [
    "fedpeft_dist.cli",
    "fedpeft_dist.federation.run",
    "matplotlib.figure",
    "tensorboard.summary.writer.event_file_writer",
]


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_fedpeft(folder: Path, *arguments: str, timeout: float = 300) -> Finished:
    """The command in a folder, until it has ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        process = context.Process(target=_run, args=(str(folder), arguments, out.name, err.name))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        return Finished(process.exitcode, Path(out.name).read_text(), Path(err.name).read_text())


def _run(folder: str, arguments: tuple[str, ...], out: str, err: str) -> None:
    for number, name in enumerate((os.devnull, out, err)):
        os.dup2(os.open(name, os.O_RDWR), number)
    os.chdir(folder)
    sys.argv = ["fedpeft", *arguments]
    from fedpeft_dist.__main__ import main

    main()
