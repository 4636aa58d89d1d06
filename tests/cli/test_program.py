"""What `fedpeft` says of itself: its version, and shell completion."""

from __future__ import annotations

import pytest

import fedpeft_dist

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
