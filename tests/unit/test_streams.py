"""Commands whose output nobody reads: they go on, and tell it where somebody may miss it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory
from tests.tiny import tiny_tree
from tests.warm_process import run_fedpeft

PRINTS = """
import sys
from fedpeft_dist.runtime.streams import lost_output, open_streams
open_streams()
with open(sys.argv[1], "w") as file:
    for _ in range(20000):
        print("a line that fills a pipe")
        print("and one that is an error", file=sys.stderr)
    file.write(f"{file.fileno() > 2} {lost_output()} {lost_output()}")
raise SystemExit(7)
"""
CONFIG = tiny_tree(data={"name": "digits"}, output={"root": "runs", "name": "run"})
FULL = "No space left on device"


@pytest.mark.parametrize(
    ("redirected", "lost"),
    [
        ("2>/dev/null | head -1 >/dev/null", None),
        ("2>&1 | head -1 >/dev/null", None),
        ("2>/dev/null >&-", None),
        (">&- 2>&- <&-", None),
        ("2>/dev/null >/dev/full", FULL),
        (">/dev/full 2>&1", FULL),
        ("2>/dev/full >/dev/null", None),
    ],
)
def test_lost_output_changes_no_exit_code(tmp_path: Path, redirected: str, lost: str | None) -> None:
    script, note = tmp_path / "prints.py", tmp_path / "note"
    script.write_text(PRINTS)
    command = f"set -o pipefail; '{sys.executable}' '{script}' '{note}' {redirected}"
    assert subprocess.run(["bash", "-c", command], timeout=60).returncode == 7
    assert note.read_text() == f"True {lost} None"


@pytest.mark.parametrize(("encoding", "expected"), [("ascii", rb"\xe9 \udcff"), ("utf-8", b"\xc3\xa9 \\udcff")])
def test_a_character_that_cannot_be_printed_is_escaped(encoding: str, expected: bytes) -> None:
    script = 'from fedpeft_dist.runtime.streams import *; open_streams(); print("\\xe9 \\udcff")'
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONIOENCODING": encoding, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        check=True,
    )
    assert done.stdout.strip() == expected


def run_with_full_stdout(folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit code of a command whose stdout is on a full disk, and what it tells on stderr."""
    done = run_fedpeft(folder, *arguments, stdout="/dev/full")
    return done.returncode, done.stderr


def test_a_full_stdout_stops_no_run_but_fails_other_commands(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    code, told = run_with_full_stdout(tmp_path, "train", "config.yaml")
    assert (code, told) == (0, f"warning: stdout: cannot be written ({FULL}); the run went on without it\n")
    assert RunDirectory(tmp_path / "runs" / "run").read_state()["state"] == COMPLETE
    for arguments in (["cost", "config.yaml", "--json"], ["report", "runs"]):
        code, told = run_with_full_stdout(tmp_path, *arguments)
        assert (code, told) == (1, f"error: stdout: cannot be written ({FULL})\n")
