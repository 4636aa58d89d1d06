"""`fedpeft fit`, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Fedpeft

REPOSITORY = Path(__file__).parents[2]


def test_prints_a_table_or_one_line_on_a_mistake(fedpeft: Fedpeft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = "configs/quickstart/head.yaml"
    code, out, err = fedpeft("fit", config, "--ranks", "2", "--gpu-memory", "1")
    assert (code, err) == (0, "")
    for words in ("head on glyph_vit: memory of each of 2 rank(s), cuda in bf16", "of 1.0 GiB", "own partition"):
        assert words in out
    assert out.splitlines()[-1] == (
        "proposal: runtime.sharding.size=1 runtime.sharding.quantize=none runtime.lanes=2 client.batch_size=16 "
        "runtime.evaluate_batch=256"
    )
    code, _, err = fedpeft("fit", config, "runtime.sharding.size=2", "--ranks", "3")
    assert code == 2
    assert "--ranks 3: makes no whole groups" in err
