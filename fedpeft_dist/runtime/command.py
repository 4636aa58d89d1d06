"""A typer app as a program: its exit codes, and the one line in which it tells the user's mistake."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from fedpeft_dist.config.errors import (
    ConfigError,
    FirstToldError,
    MachineFaultError,
    PeerLostError,
    ToldElsewhereError,
    one_line,
)
from fedpeft_dist.config.paths import expand_path
from fedpeft_dist.runtime.interrupts import StopRequest, listen_for_stop
from fedpeft_dist.runtime.launch import find_launch, follow_agent
from fedpeft_dist.runtime.streams import lost_output, open_streams

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 75
GRACE_SECONDS = 5
"""Seconds that a silent rank waits for the rank that prints the error."""
UsageError = typer.BadParameter.__base__  # click's own, or the copy in newer versions of typer


def run_app(app: typer.Typer, name: str | None = None) -> None:
    """Runs a command and turns errors into exit codes. `name` is the program's in its help, else the command line's."""
    open_streams()
    try:
        if app(prog_name=name, standalone_mode=False):  # newer versions of typer turn Ctrl-C into a returned code
            raise SystemExit(1)
        if reason := lost_output():
            print(f"error: stdout: cannot be written ({reason})", file=sys.stderr)
            raise SystemExit(1)
    except ConfigError as error:
        _refuse(error, one_line(error))
    except UsageError as error:
        if not error.format_message():  # typer has printed the help instead
            raise SystemExit(EXIT_MISTAKE) from None
        _refuse(error, one_line(error.format_message()))
    except MachineFaultError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except PeerLostError as error:
        if error.is_told:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (typer.Abort, KeyboardInterrupt):
        raise SystemExit(1) from None


def _refuse(error: Exception, told: str) -> NoReturn:
    """Prints the user's mistake, on one rank of each machine at most, and ends the process."""
    launch = find_launch()
    # torchrun ends all ranks as soon as one has failed. The rank that prints exits first; silent ranks wait for it.
    is_silent = isinstance(error, ToldElsewhereError)
    if is_silent or (launch.local_rank and not isinstance(error, FirstToldError)):
        time.sleep(GRACE_SECONDS)
        # A mistake found before the group was formed is every rank's, and the machine's first rank has printed it. A
        # rank that is still running now made its mistake alone, except under srun, which lets every rank end by itself.
        is_silent = is_silent or launch.is_step
    if not is_silent:
        print(f"error: {told}", file=sys.stderr)
    raise SystemExit(EXIT_MISTAKE)


@contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Listens for stop signals while a command runs rounds. Lost output is only a warning: it is mere progress."""
    with listen_for_stop(is_last=True) as stop:
        follow_agent()
        yield stop
    if reason := lost_output():
        print(f"warning: stdout: cannot be written ({reason}); the run went on without it", file=sys.stderr)


def leave_interrupted(advice: str = "run the same command to go on") -> NoReturn:
    if find_launch().rank == 0:
        print(f"interrupted; {advice}", file=sys.stderr)
    raise SystemExit(EXIT_INTERRUPTED)


def user_path(text: str | Path) -> Path:
    """Parses an argument; raises BadParameter for no path. One that exists exactly as written is taken literally."""
    try:
        return Path(text if os.path.lexists(text) else expand_path(str(text)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
