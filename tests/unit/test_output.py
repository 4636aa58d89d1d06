"""Commands whose output ends before they do: the reader of a pipe goes, or a terminal is closed."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NOTE = "note: nobody reads the output any more; the command goes on without it\n"
COMMAND = """
import sys
from pathlib import Path
from rich.console import Console
from fedpeft_dist.runtime.output import outlive_output

outlive_output()
print("first", flush=True)
sys.stdin.readline()  # the reader goes meanwhile
for _ in range(3):
    print("line", flush=True)
    Console().print("a line of rich's")
    print("line", file=sys.stderr)
sys.stdout.write("x" * 100_000)
Path(sys.argv[1]).write_text("done")
print("is never flushed by the command itself")
raise SystemExit(75)
"""


def open_pipe() -> tuple[int, int]:
    return os.pipe()


def open_terminal() -> tuple[int, int]:
    return pty.openpty()


def open_socket() -> tuple[int, int]:
    first, second = socket.socketpair()
    return first.detach(), second.detach()


def run_until_reader_goes(work: Path, ends: tuple[int, int], options: list[str], has_own_stderr: bool) -> str:
    """Starts the command, closes its output after the first line, and returns what it says on its own stderr."""
    reader, output = ends
    process = subprocess.Popen(
        [sys.executable, *options, "-c", COMMAND, str(work)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.PIPE if has_own_stderr else output,
        text=True,
    )
    os.close(output)
    assert os.read(reader, 100).startswith(b"first")
    os.close(reader)
    _, said = process.communicate("go on\n", timeout=60)
    assert process.returncode == 75, said
    assert work.read_text() == "done"
    return said


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("open_ends", [open_pipe, open_terminal, open_socket])
def test_goes_on_and_says_so_once_when_its_reader_goes(
    tmp_path: Path, open_ends: Callable[[], tuple[int, int]], options: list[str]
) -> None:
    said = run_until_reader_goes(tmp_path / "work", open_ends(), options, has_own_stderr=True)
    assert said.count(NOTE) == 1
    assert said.replace(NOTE, "") == 3 * "line\n"


@pytest.mark.parametrize("open_ends", [open_pipe, open_terminal, open_socket])
def test_goes_on_when_its_errors_go_nowhere_either(tmp_path: Path, open_ends: Callable[[], tuple[int, int]]) -> None:
    run_until_reader_goes(tmp_path / "work", open_ends(), [], has_own_stderr=False)


@pytest.mark.parametrize("program", [["-m", "fedpeft_dist"], ["launch/sweep.py"], ["launch/submit.py"]])
def test_each_program_keeps_its_exit_code_without_a_reader(program: list[str]) -> None:
    reader, output = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, *program, "--help"], cwd=REPOSITORY, stdout=output, stderr=subprocess.PIPE, text=True
    )
    os.close(output)
    assert (process.returncode, process.stderr) == (0, NOTE)


def test_a_full_disk_is_still_told(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", COMMAND, str(tmp_path / "work")],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert process.returncode == 1
    assert "No space left on device" in process.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_output_is_what_it_was_before(encoding: str) -> None:
    command = "import sys\nprint('größe\\udcff\\n', end='')\nprint('error', file=sys.stderr)"
    install = "from fedpeft_dist.runtime.output import outlive_output\noutlive_output()\n"
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:backslashreplace"}
    found = [
        subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, timeout=60)
        for text in (command, install + command)
    ]
    assert found[0].stdout == found[1].stdout != b""
    assert found[0].stderr == found[1].stderr == b"error\n"


def test_closed_descriptors_stay_closed() -> None:
    command = "from fedpeft_dist.runtime.output import outlive_output\noutlive_output()\nprint('nowhere')"
    assert subprocess.run(f'exec "{sys.executable}" -c "{command}" >&- 2>&-', shell=True, timeout=60).returncode == 0
