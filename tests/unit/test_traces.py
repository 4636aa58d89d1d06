"""Traces that do not fit: one line names the key, the file, the problem and the valid choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fedpeft_dist.config.errors import ConfigError
from tests.participation_fixtures import AVAILABILITY, DEVICES, DROPOUT, make_participation, write_trace

COLUMNS = {"availability": AVAILABILITY, "dropout": DROPOUT, "devices": DEVICES}
WHOLE = [(0, 0, 60, 1), (0, 60, 100, 0), (1, 0, 100, 1)]
SPEEDS = [(0, 10, 1000, 1000), (1, 20.5, 1e3, 1000)]


def refusal(path: Path, kind: str, cohort: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        make_participation(2, cohort, **{kind: {"name": "trace", "path": str(path)}}).check()
    message = str(caught.value)
    assert f"federation.participation.{kind}.path: '{path}'" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        ("availability", WHOLE[:2], ["no row for client 1;", "all 2 clients"]),
        ("availability", [(0, 60, 100, 0), (1, 0, 100, 1)], ["client 0, seconds 60 to 100", "should start at 0"]),
        ("availability", [(0, 0, 50, 1), *WHOLE[1:]], ["client 0, seconds 0 to 50", "gap", "starts at 60"]),
        ("availability", [(0, 0, 70, 1), *WHOLE[1:]], ["client 0, seconds 0 to 70", "overlaps", "starts at 60"]),
        ("availability", [*WHOLE, (1, 0, 100, 1)], ["client 1, seconds 0 to 100", "overlaps", "starts at 0"]),
        ("availability", [*WHOLE[:2], (1, 0, 90, 1)], ["client 1", "should end at 100"]),
        ("availability", [(0, 0, 0, 1), (0, 0, 100, 0), WHOLE[2]], ["client 0, seconds 0 to 0", "end after it starts"]),
        ("availability", [*WHOLE[:2], (1, 0, "nan", 1)], ["client 1, seconds 0 to nan", "end after it starts"]),
        ("availability", [*WHOLE[:2], (1, 0, 100, 2)], ["client 1", "available is 2", "0 or 1"]),
        ("availability", [*WHOLE, (2, 0, 100, 1)], ["client 2, which does not exist", "0 to 1"]),
        ("availability", [*WHOLE, (-1, 0, 100, 1)], ["client -1, which does not exist"]),
        ("availability", [*WHOLE[:2], (1, 0, 100, "on")], ["line 4 has 'on' for available", "no whole", AVAILABILITY]),
        ("availability", [*WHOLE[:2], (1, 0, 100)], ["line 4 has 3 columns", AVAILABILITY]),
        ("availability", [], ["no rows"]),
        ("dropout", [(1, 5, "after")], ["client 5, which does not exist"]),
        ("dropout", [(0, 1, "after")], ["round 0", "counted from 1"]),
        ("dropout", [(1, 1, "never")], ["when is 'never'", "before, during, after"]),
        ("dropout", [(1, 1, "duringly")], ["when is 'duringl'", "before, during, after"]),
        ("dropout", [(3, 1, "before"), (3, 0, "after"), (3, 1, "after")], ["client 1 twice in round 3"]),
        ("dropout", [(1.5, 1, "after")], ["line 2 has '1.5' for round", DROPOUT]),
        ("devices", SPEEDS[:1], ["no row for client 1"]),
        ("devices", [*SPEEDS, SPEEDS[0]], ["more than one row for client 0"]),
        ("devices", [SPEEDS[0], (1, -2, 10, 10)], ["samples_per_second of client 1 is -2", "above 0"]),
        ("devices", [SPEEDS[0], (1, 2, 0, 10)], ["uplink_bytes_per_second of client 1 is 0"]),
        ("devices", [SPEEDS[0], (1, 2, "fast", 10)], ["line 3 has 'fast' for uplink", "no number"]),
        ("devices", [SPEEDS[0], (10**30, 2, 1, 10)], ["out of range"]),
        ("devices", [SPEEDS[0], (1, 2, 10, "inf")], ["downlink_bytes_per_second of client 1 is inf"]),
    ],
)
def test_refuses_wrong_rows(tmp_path: Path, kind: str, rows: Sequence[Sequence], words: list[str]) -> None:
    message = refusal(Path(write_trace(tmp_path / "trace.csv", COLUMNS[kind], rows)), kind)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.filterwarnings("error")
def test_refuses_files_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    assert "No such file" in refusal(tmp_path / "gone.csv", kind)
    assert "Is a directory" in refusal(tmp_path, kind)
    wrong = Path(write_trace(tmp_path / "wrong.csv", "client,speed", [(0, 1)]))
    message = refusal(wrong, kind)
    assert "begins with 'client,speed'" in message
    assert f"should be {COLUMNS[kind]}" in message
    (tmp_path / "empty.csv").write_text("")
    assert "begins with ''" in refusal(tmp_path / "empty.csv", kind)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(tmp_path / "binary.csv", kind)


def test_refuses_a_cohort_that_is_never_available_at_once(tmp_path: Path) -> None:
    rows = [(0, 0, 60, 1), (0, 60, 100, 0), (1, 0, 60, 0), (1, 60, 100, 1)]
    path = Path(write_trace(tmp_path / "trace.csv", AVAILABILITY, rows))
    with pytest.raises(ConfigError) as caught:
        make_participation(2, 2, availability={"name": "trace", "path": str(path)}).check()
    assert "federation.cohort: 2 is larger than the 1 clients that are ever available at once" in str(caught.value)
    assert f"'{path}'; give at most 1" in str(caught.value)
    make_participation(2, 1, availability={"name": "trace", "path": str(path)}).check()


def test_reads_the_files_of_spreadsheets(tmp_path: Path) -> None:
    """The file has a byte order mark, Windows' line ends, blanks around commas, and no newline at the end."""
    path = tmp_path / "trace.csv"
    text = DEVICES.replace(",", " , ") + "\r\n0, 10, 1000, 1000\r\n1 ,20.5,1e3,1000"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    devices = make_participation(2, 1, devices={"name": "trace", "path": str(path)}).devices
    assert np.array_equal(devices.samples_per_second, [10, 20.5])


def test_the_digest_covers_the_contents(tmp_path: Path) -> None:
    def digest(content: Sequence[Sequence], name: str) -> str:
        path = write_trace(tmp_path / name, DEVICES, content)
        return make_participation(2, 1, devices={"name": "trace", "path": path}).sha256

    assert digest(SPEEDS, "a.csv") == digest(SPEEDS, "b.csv") != digest(SPEEDS[::-1], "c.csv")
    assert make_participation(2, 1).sha256 == ""
