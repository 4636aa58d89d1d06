"""Files and folders that appear whole or not at all, under the longest names that a system takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft_dist.export import write_folder
from fedpeft_dist.runtime.files import write_text

LONGEST = ["x" * 251 + ".txt", "é" * 125 + ".txt", "x" * 3 + "😀" * 62 + ".txt"]


@pytest.mark.parametrize("name", LONGEST)
def test_a_file_of_the_longest_name_is_written(tmp_path: Path, name: str) -> None:
    for text in ("first", "second"):
        write_text(tmp_path / name, text)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, text)]


@pytest.mark.parametrize("name", LONGEST)
def test_a_folder_of_the_longest_name_is_written(tmp_path: Path, name: str) -> None:
    for text in ("first", "second"):
        write_folder(tmp_path / name, lambda folder, text=text: (folder / "config.json").write_text(text))
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name / "config.json").read_text() == text
