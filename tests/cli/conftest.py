"""The command, called in this process (a new one takes seconds to import), and what it says when it refuses."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fedpeft_dist import cli


class Finished(NamedTuple):
    """A command that has ended: its exit code, and what went to stdout and stderr."""

    code: int
    out: str
    err: str


Fedpeft = Callable[..., Finished]
Refuse = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fedpeft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Fedpeft:
    """fedpeft("cost", "config.yaml", ...): the console script's function, in the folder that the test is in."""

    def run(*arguments: str) -> Finished:
        monkeypatch.setattr(sys, "argv", ["fedpeft", *arguments])
        capsys.readouterr()
        caplog.clear()
        code = 0
        # Inside pytest neither a warning nor a logged one reaches stderr: they are told here as a user would see them.
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", hidden)
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
        output = capsys.readouterr()
        logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        told = [f"{line}\n" for line in [*logged, *(str(warning.message) for warning in warned)]]
        return Finished(code or 0, output.out, output.err + "".join(told))

    return run


@pytest.fixture
def refuse(fedpeft: Fedpeft, folder: Path) -> Refuse:
    """refuse("train", "config.yaml", ...): runs the command, checks what all refusals share, returns the line."""

    def run(*arguments: str) -> str:
        before = snapshot(folder)
        code, out, err = fedpeft(*arguments)
        assert (code, out) == (2, ""), err
        assert snapshot(folder) == before, "the command left something behind"
        return only_error_line(err)

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content, and every folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def only_error_line(told: str) -> str:
    lines = told.splitlines()
    assert len(lines) == 1, "not one line:\n" + told
    assert lines[0].startswith("error: ")
    assert "Traceback" not in lines[0]
    return lines[0]


def assert_tells(line: str, *words: str) -> None:
    for word in words:
        assert word in line
