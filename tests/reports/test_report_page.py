"""report.html in a real browser, from file://: sorting, the filter, highlighting, no request, no overflow."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedpeft_dist.reports.report import Report, write_report
from fedpeft_dist.tracking.run_directory import INTERRUPTED
from tests.report_fixtures import curve, make_privacy_sweep, make_run, partition_counts

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

METHODS = {"head": 0.5, "bias": 0.75, "adapter": 0.625, "full": 0.6875}
NASTY = "n</script><img src=x onerror=alert(1)>\"'é"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report over two data sets, two partitions and two seeds, and an unfinished run named to break out."""
    folder = tmp_path_factory.mktemp("runs")
    for data in ("digits", "glyphs"):
        for partition in ({"name": "dirichlet", "alpha": 0.1}, {"name": "iid"}):
            for method, accuracy in METHODS.items():
                for seed in (1, 2):
                    tree = {
                        "seed": seed,
                        "method": {"name": method},
                        "data": {"name": data, "clients": 8, "partition": partition},
                        "federation": {"cohort": 4},
                    }
                    final = accuracy + seed / 100 + (0.1 if partition["name"] == "iid" else 0.0)
                    counts = partition_counts(seed) if partition["name"] == "dirichlet" else [[5] * 10] * 8
                    path = folder / f"{data}-{partition['name']}-{method}-{seed}"
                    seconds = 90.0 if data == "digits" else None
                    make_run(path, tree, curve(final, rounds=10), counts=counts, simulated_seconds=seconds)
    make_run(folder / NASTY.replace("/", "\N{FRACTION SLASH}"), {"method": {"name": "lora"}}, state=INTERRUPTED)
    write_report(folder, Report(folder))
    return folder / "report.html"


@pytest.fixture(scope="module")
def private_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    make_privacy_sweep(folder)
    write_report(folder, Report(folder))
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed")
    options = Options()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@contextmanager
def opened_at(width: int, browser: webdriver.Chrome, page: Path) -> Iterator[webdriver.Chrome]:
    """A freshly opened page. Afterwards: no error was logged, nothing was requested, nothing overflows."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.fixture(params=[1600, 380])
def opened(request: pytest.FixtureRequest, browser: webdriver.Chrome, page: Path) -> Iterator[webdriver.Chrome]:
    with opened_at(request.param, browser, page) as found:
        yield found


@pytest.fixture(params=[1600, 380])
def private(
    request: pytest.FixtureRequest, browser: webdriver.Chrome, private_page: Path
) -> Iterator[webdriver.Chrome]:
    with opened_at(request.param, browser, private_page) as found:
        yield found


def rows(browser: webdriver.Chrome) -> list[WebElement]:
    return [row for row in browser.find_elements(By.CSS_SELECTOR, "#groups tbody tr") if row.is_displayed()]


def column(browser: webdriver.Chrome, heading: str) -> list[str]:
    headings = browser.find_elements(By.CSS_SELECTOR, "#groups thead th")
    number = [text_of(cell) for cell in headings].index(heading)
    return [text_of(row.find_elements(By.CSS_SELECTOR, "td, th")[number]) for row in rows(browser)]


def text_of(element: WebElement) -> str:
    return element.get_property("textContent").strip()


def sort_by(browser: webdriver.Chrome, heading: str) -> WebElement:
    for cell in browser.find_elements(By.CSS_SELECTOR, "#groups thead th"):
        if text_of(cell) == heading:
            cell.find_element(By.TAG_NAME, "button").click()
            return cell
    raise AssertionError(f"no column {heading}")


def lines(browser: webdriver.Chrome, chart: str = "chart-round") -> list[Any]:
    return browser.find_elements(By.CSS_SELECTOR, f"#{chart} polyline")


@pytest.mark.parametrize(
    ("heading", "key"),
    [
        ("final accuracy", lambda text: float(text.split()[0])),
        ("trained parameters", lambda text: int(text.replace(",", ""))),
        ("method", str),
    ],
)
def test_a_click_on_a_heading_sorts_the_table(
    opened: webdriver.Chrome, heading: str, key: Callable[[str], Any]
) -> None:
    before = column(opened, heading)
    assert len(before) == 16
    cell = sort_by(opened, heading)
    assert column(opened, heading) == sorted(before, key=key)
    assert cell.get_attribute("aria-sort") == "ascending"
    sort_by(opened, heading)
    assert column(opened, heading) == sorted(before, key=key, reverse=True)
    assert cell.get_attribute("aria-sort") == "descending"
    others = opened.find_elements(By.CSS_SELECTOR, "#groups th[aria-sort]:not([aria-sort='none'])")
    assert others == [cell]


def test_the_filter_applies_to_table_and_lines(opened: webdriver.Chrome) -> None:
    assert len(lines(opened)) == len(lines(opened, "chart-mib")) == 16
    box = opened.find_element(By.ID, "filter")
    box.send_keys("Bias iid")
    assert column(opened, "method") == ["bias", "bias"]
    assert column(opened, "partition") == ["iid", "iid"]
    assert len(lines(opened)) == len(lines(opened, "chart-mib")) == 2
    assert opened.find_element(By.ID, "matches").text == "2 of 16 groups"
    assert len(opened.find_elements(By.CSS_SELECTOR, "#chart-round polygon")) == 2  # two seeds make a band
    box.send_keys(" nonsense")
    assert rows(opened) == []
    assert lines(opened) == []


def test_timed_runs_have_a_chart_against_simulated_hours(opened: webdriver.Chrome) -> None:
    assert len(lines(opened, "chart-hours")) == len(lines(opened)) / 2 == 8
    ticks = [text.text for text in opened.find_elements(By.CSS_SELECTOR, "#chart-hours text")]
    assert "0.1" in ticks
    assert "0.2" in ticks


def test_private_groups_have_a_chart_against_epsilon(private: webdriver.Chrome) -> None:
    """Two lines of sample and a point of user; noise without a guarantee stands in its own field, off the axis."""
    (chart,) = private.find_elements(By.CSS_SELECTOR, "#epsilon .chart")
    points = [len(line.get_attribute("points").split()) for line in chart.find_elements(By.TAG_NAME, "polyline")]
    assert sorted(points) == [1, 2, 2]
    assert len(chart.find_elements(By.CSS_SELECTOR, "line.public")) == 2
    edge = float(chart.find_element(By.CSS_SELECTOR, "rect.beside").get_attribute("x"))
    crosses = chart.find_elements(By.TAG_NAME, "path")
    assert len(crosses) == 2
    assert all(float(cross.get_attribute("d")[1:].split(",")[0]) > edge for cross in crosses)
    circles = chart.find_elements(By.TAG_NAME, "circle")
    assert len(circles) == 5
    assert all(float(circle.get_attribute("cx")) < edge for circle in circles)
    labels = [text.text for text in chart.find_elements(By.TAG_NAME, "text")]
    assert {"2", "5", "20", "no guarantee"} <= set(labels)
    keys = [item.text for item in private.find_elements(By.CSS_SELECTOR, "#epsilon .keys li")]
    assert keys == ["head", "full", "sample", "user", "no privacy"]


def test_a_pointer_reads_an_epsilon(private: webdriver.Chrome) -> None:
    script = """
      const svg = document.querySelector("#epsilon svg");
      const mark = svg.querySelector(arguments[0]).getBoundingClientRect();
      const place = {clientX: mark.left + mark.width / 2, clientY: mark.top + mark.height / 2};
      svg.dispatchEvent(new PointerEvent("pointermove", place));
      return document.querySelector("#epsilon .tip").textContent;
    """
    assert private.execute_script(script, "circle") == "head, privacy sample (epsilon 2): 0.4150 ± 0.0071, epsilon 2"
    noise = "head, privacy paper_noise (no guarantee, nominal epsilon 5): 0.1150 ± 0.0071, no guarantee"
    assert private.execute_script(script, "path") == noise


def test_the_privacy_table_notes_the_values_outside_the_guarantee(private: webdriver.Chrome) -> None:
    assert "Privacy guarantees" in [
        text_of(found) for found in private.find_elements(By.CSS_SELECTOR, "#privacy caption")
    ]
    note = private.find_element(By.CSS_SELECTOR, "#privacy .note")
    assert note.is_displayed()
    assert "Outside the guarantee of sample: train_loss, rejected and accuracy" in note.text
    assert "paper_noise carries no guarantee" in note.text


def test_a_page_without_private_runs_has_no_privacy_section(opened: webdriver.Chrome) -> None:
    assert not opened.find_element(By.ID, "privacy").is_displayed()


def test_ticked_groups_are_highlighted(opened: webdriver.Chrome) -> None:
    first, _, third, *_ = rows(opened)
    first.find_element(By.CSS_SELECTOR, ".pick").click()
    third.find_element(By.CSS_SELECTOR, "th").click()  # anywhere in a row
    legend = [item.text for item in opened.find_elements(By.CSS_SELECTOR, "#legend li")]
    assert len(legend) == 2
    bright = [line for line in lines(opened) if "faded" not in line.get_attribute("style")]
    assert len(bright) == 2
    assert len(lines(opened)) == 16
    opened.find_element(By.ID, "clear").click()
    assert not any(box.is_selected() for box in opened.find_elements(By.CSS_SELECTOR, "#groups input"))
    assert [item.text for item in opened.find_elements(By.CSS_SELECTOR, "#legend li")] == list(METHODS)


PICKED = """
  const curves = [...document.querySelectorAll("#chart-round .curve")];
  const opacity = (curve) => Number(getComputedStyle(curve).opacity);
  return [curves.filter((curve) => opacity(curve) === 1).length, curves.filter((curve) => opacity(curve) < 0.5).length];
"""


def test_pointing_at_a_name_picks_out_its_line(opened: webdriver.Chrome) -> None:
    opened.find_element(By.ID, "filter").send_keys("digits iid")
    names = opened.find_elements(By.CSS_SELECTOR, "#legend button")
    assert [name.text for name in names] == [f"{method}, digits, iid" for method in ("head", "bias", "adapter", "full")]
    assert opened.execute_script(PICKED) == [4, 0]
    webdriver.ActionChains(opened).scroll_to_element(names[1]).move_to_element(names[1]).perform()
    assert opened.execute_script(PICKED) == [1, 3]
    chosen = opened.find_elements(By.CSS_SELECTOR, "#chart-mib .curve.chosen")
    (same,) = (line for line in lines(opened, "chart-mib") if line in chosen)
    assert same.get_attribute("style") == lines(opened)[1].get_attribute("style")
    webdriver.ActionChains(opened).move_to_element(opened.find_element(By.TAG_NAME, "h1")).perform()
    assert opened.execute_script(PICKED) == [4, 0]
    row = rows(opened)[0].find_element(By.TAG_NAME, "th")
    webdriver.ActionChains(opened).scroll_to_element(row).move_to_element(row).perform()
    assert opened.execute_script(PICKED) == [1, 3]


def test_the_keyboard_picks_out_a_line(opened: webdriver.Chrome) -> None:
    opened.find_element(By.ID, "filter").send_keys("digits")
    first, second, *_ = opened.find_elements(By.CSS_SELECTOR, "#legend button")
    opened.find_element(By.ID, "show-unfinished").send_keys(Keys.TAB)
    assert opened.switch_to.active_element == first
    assert opened.execute_script(PICKED) == [1, 7]
    first.send_keys(Keys.TAB)
    assert opened.switch_to.active_element == second
    assert opened.execute_script(PICKED) == [1, 7]
    opened.execute_script("document.activeElement.blur()")
    assert opened.execute_script(PICKED) == [8, 0]


def test_a_method_of_many_lines_is_picked_out_as_one(opened: webdriver.Chrome) -> None:
    names = opened.find_elements(By.CSS_SELECTOR, "#legend button")
    assert [name.text for name in names] == list(METHODS)
    webdriver.ActionChains(opened).scroll_to_element(names[0]).move_to_element(names[0]).perform()
    assert opened.execute_script(PICKED) == [4, 12]


@pytest.mark.parametrize(("words", "lowest"), [("", 0.05), ("digits full iid", 0.07)])
def test_the_chart_begins_a_little_below_the_lowest_accuracy(
    opened: webdriver.Chrome, words: str, lowest: float
) -> None:
    """The lowest and the highest point lie within a tenth of the chart's height from its floor and ceiling."""
    opened.find_element(By.ID, "filter").send_keys(words)
    ys = [float(point.split(",")[1]) for line in lines(opened) for point in line.get_attribute("points").split()]
    height = opened.find_element(By.ID, "chart-round").size["height"]
    assert height - 28 - 0.1 * height < max(ys) < height - 28
    assert 12 < min(ys) < 12 + 0.1 * height
    ticks = [float(text.text) for text in opened.find_elements(By.CSS_SELECTOR, "#chart-round text[text-anchor=end]")]
    assert min(ticks) >= lowest


def test_unfinished_runs_are_listed_and_can_be_drawn(opened: webdriver.Chrome) -> None:
    cells = [text_of(cell) for cell in opened.find_elements(By.CSS_SELECTOR, "main > section:last-child tbody *")]
    assert NASTY.replace("/", "\N{FRACTION SLASH}") in cells
    assert "interrupted" in cells
    opened.find_element(By.ID, "show-unfinished").click()
    assert len(lines(opened)) == 17
    assert not opened.find_elements(By.TAG_NAME, "img")


def test_partitions_are_drawn(opened: webdriver.Chrome) -> None:
    pictures = opened.find_elements(By.CSS_SELECTOR, "#pictures canvas")
    assert len(pictures) == 6  # of each data set: iid, and dirichlet with either seed
    colours = "return new Set(this.getContext('2d').getImageData(0, 0, 10, 8).data).size".replace(
        "this", "arguments[0]"
    )
    assert all(opened.execute_script(colours, picture) > 2 for picture in pictures)
    assert all(picture.get_attribute("aria-label") for picture in pictures)


def test_a_pointer_reads_a_line(opened: webdriver.Chrome) -> None:
    opened.find_element(By.ID, "filter").send_keys("bias iid digits")
    svg = opened.find_element(By.CSS_SELECTOR, "#chart-round svg")
    webdriver.ActionChains(opened).scroll_to_element(svg).perform()
    script = """
      const line = document.querySelector("#chart-round polyline");
      const points = line.getAttribute("points").split(" ").at(-1).split(",");
      const frame = document.querySelector("#chart-round svg").getBoundingClientRect();
      const place = {clientX: frame.left + Number(points[0]), clientY: frame.top + Number(points[1])};
      document.querySelector("#chart-round svg").dispatchEvent(new PointerEvent("pointermove", place));
      return document.querySelector("#chart-round .tip").textContent;
    """
    assert (
        opened.execute_script(script) == "bias, digits, iid: 0.8650 ± 0.0071, round 10, 1.25 MiB, 0.25 simulated hours"
    )


def test_tables_are_accessible(opened: webdriver.Chrome) -> None:
    for table in opened.find_elements(By.TAG_NAME, "table"):
        assert text_of(table.find_element(By.TAG_NAME, "caption"))
        assert table.find_elements(By.CSS_SELECTOR, "thead th[scope=col] button")
        assert table.find_elements(By.CSS_SELECTOR, "tbody th[scope=row]")
        frame = table.find_element(By.XPATH, "..")
        assert frame.get_attribute("tabindex") == "0"  # the keyboard can scroll the frame
    titles = [text_of(caption) for caption in opened.find_elements(By.CSS_SELECTOR, "#tables caption")]
    assert "Data distribution" in titles
    assert "Communication" in titles
