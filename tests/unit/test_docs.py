"""The README and the pages in docs/: every link, path and command that they show exists."""

import re
from pathlib import Path

import pytest
import typer

from fedpeft_dist.cli import app

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(
    r"(?:(?<![\w/.-])|(?<=\./))(?:benchmarks|configs|docs|fedpeft_dist|launch|slurm|tests)/[\w./*-]*\w[\w*/]*"
)
COMMAND = re.compile(r"(?:`| {4}|-m )fedpeft(?:_dist)? ([a-z]+)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@every_page
def test_relative_links_exist(page):
    for link in LINK.findall(page.read_text()):
        name, _, anchor = link.partition("#")
        if not name.startswith(("http://", "https://")):
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@every_page
def test_named_paths_exist(page):
    for path in PATH.findall(page.read_text()):
        assert any(REPOSITORY.glob(path.rstrip("/"))), path


@every_page
def test_named_commands_exist(page):
    known = set(typer.main.get_command(app).commands)
    assert set(COMMAND.findall(page.read_text())) <= known


def test_readme_links_every_page():
    linked = {link for link in LINK.findall(README.read_text()) if link.startswith("docs/")}
    assert linked == {f"docs/{page.name}" for page in PAGES[1:]}


@pytest.mark.parametrize("page", [README, REPOSITORY / "docs" / "how_it_works.md"], ids=lambda page: page.name)
def test_tree_names_every_part_of_the_package(page):
    text = page.read_text()
    for part in (REPOSITORY / "fedpeft_dist").iterdir():
        if not part.name.startswith("_"):
            assert f" {part.name}{'/' if part.is_dir() else ''} " in text, part


def test_readme_has_at_most_160_lines():
    assert len(README.read_text().splitlines()) <= 160


def test_readme_names_the_command_that_ci_runs():
    assert "./launch/test.sh" in README.read_text()
    assert "./launch/test.sh" in (REPOSITORY / ".ci" / "run").read_text()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
