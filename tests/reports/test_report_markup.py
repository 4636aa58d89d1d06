"""The markup of report.html."""

from __future__ import annotations

import json
import warnings
from html.parser import HTMLParser
from pathlib import Path

from fedpeft_dist.reports.page import script_json
from fedpeft_dist.reports.report import Report, write_report
from fedpeft_dist.tracking.run_directory import INTERRUPTED
from tests.report_fixtures import (
    curve,
    make_run,
    partition_counts,
    tree,
)

NASTY = "a</script><b onclick='x'>&amp; \"q\" {{data}} é💡 <!-- |"


class Page(HTMLParser):
    """Counts elements and keeps texts, as a browser would see them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_names_of_runs_are_escaped(tmp_path: Path) -> None:
    name = NASTY.replace("/", "\N{FRACTION SLASH}")
    make_run(tmp_path / name, tree("lora"), state=INTERRUPTED)
    make_run(tmp_path / "done", tree(backbone={"model_args": {"note": NASTY}}), curve(0.5))
    make_run(tmp_path / "other", tree(), curve(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path, Report(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("script") == 2
    assert "b" not in page.tags
    assert name in page.texts
    data = json.loads(next(text for text in page.texts if text.startswith('{"series"')))
    assert name in {series["label"].removesuffix(" (interrupted)") for series in data["series"]}
    markdown = (tmp_path / "report.md").read_text()
    assert "<b" not in markdown
    assert "&lt;!-- \\|" in markdown


def test_json_cannot_end_its_script() -> None:
    text = script_json({"name": NASTY})
    assert "<" not in text
    assert json.loads(text) == {"name": NASTY}


def test_the_page_refers_to_nothing_outside_itself(runs: Path) -> None:
    write_report(runs, Report(runs))
    page = Page((runs / "report.html").read_text())
    assert [value for name, value in page.attributes if name in ("src", "href")] == ["data:,"]
    assert any(value and value.startswith("default-src 'none'") for _, value in page.attributes)


def test_a_page_of_many_runs_stays_small(tmp_path: Path) -> None:
    for number in range(60):
        config = tree(seed=number % 3, client={"epochs": number // 3 + 1})
        make_run(tmp_path / str(number), config, curve(0.5, rounds=50), counts=partition_counts(number % 3, 64, 100))
    write_report(tmp_path, Report(tmp_path))
    assert (tmp_path / "report.html").stat().st_size < 2**19
