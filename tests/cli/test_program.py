"""The program as a whole: its version, shell completion, and its entry from Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import fedpeft_dist
from tests.data_fixtures import run_tree

from .conftest import Fedpeft


def test_version_prints_name_and_number(fedpeft: Fedpeft) -> None:
    assert fedpeft("--version") == (0, f"fedpeft_dist {fedpeft_dist.__version__}\n", "")


def test_help_offers_completion(fedpeft: Fedpeft) -> None:
    code, out, err = fedpeft("--help")
    assert (code, err) == (0, "")
    for words in ("Usage: fedpeft", "--version", "--install-completion", "--show-completion"):
        assert words in out


def test_shell_completion_names_the_commands(fedpeft: Fedpeft, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_FEDPEFT_COMPLETE": "complete_bash", "COMP_WORDS": "fedpeft p", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name, value)
    code, out, err = fedpeft()
    assert (code, err) == (0, "")
    assert out.split() == ["partition", "privacy", "prefetch", "pretrain"]


def test_train_from_python_runs_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_tree(tmp_path / "runs", name="digits")), encoding="utf-8")
    assert fedpeft_dist.train("config.yaml", "federation.rounds=1", "output.name=from-python") == "complete"
    assert (tmp_path / "runs" / "from-python" / "summary.json").exists()
