"""The page of papers and measurements: what it holds, what it needs, how it behaves."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support.benchmarks import QUICK, calm, tiny
from support.browser import Page, needs_browser

from xattn_ops import cli
from xattn_ops.benchmarks import memory, report, runner, sweep, throughput
from xattn_ops.benchmarks.cases import FORWARD
from xattn_ops.benchmarks.roofline import Roofline
from xattn_ops.papers import PAPERS
from xattn_ops.report import html

VOID = {"meta", "br", "path", "use", "rect", "stop"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of results with something of everything, its times made up."""
    folder = tmp_path_factory.mktemp("results")
    roof = Roofline()
    roof._flops[torch.float32], roof._bandwidth[1 << 20] = 4e11, 1e11
    (row,) = runner.run(tiny("cpsa"), QUICK, roof)
    fast = replace(row, timing=calm(1e-3), baselines={"eager": calm(3e-3)}, best_ratio=3.0)
    rows = [
        replace(fast, shape=shape, timing=calm(1e-3 * k), best_ratio=ratio)
        for k, (shape, ratio) in enumerate(
            [("10x10x8", 12.5), ("9x9x8", 3.0), ("8x8x8", 101.0), ("<b>&7</b>", None)], start=1
        )
    ]
    rows.append(replace(row, check=replace(row.check, passed=False), timing=None))
    found = [
        sweep.Sweep("ipsa", "fused", over, "float32", FORWARD, "cpu", [
            sweep.Point(size, size, size * 1000, 1 << 20, 1e-6 * size**1.4) for size in (1, 2, 4, 8)
        ])
        for over in sweep.OVER
    ]  # fmt: skip
    for one in found:
        one.fit = sweep.fit(one, 32 << 20)
    rate = throughput.Rate(
        "crossvit_15", 224, 8, "float32", "cpu", 27_528_464, 5_790_600_000, calm(0.4), calm(0.8),
        printed=640,
    )  # fmt: skip
    peak = memory.Peak("cpsa", "8x8x8", 8, "float32", "fused", 3 << 20, 1 << 20, 0, 64)
    data = report.to_json(rows, [peak], roof, 1, {"batch": 8}, found, [rate])
    (folder / "2026-01-02-machine.json").write_text(json.dumps(data))
    old = {key: value for key, value in data.items() if key not in ("sweeps", "throughput")}
    (folder / "2026-01-01-machine.json").write_text(json.dumps(old | {"schema": 1}))
    return folder


@pytest.fixture(scope="module")
def page(results: Path) -> Path:
    out = results / "new" / "report.html"
    assert cli.main(["report", "--results", str(results), "--out", str(out)]) == 0
    return out


class Reader(HTMLParser):
    """Checks that tags nest, and collects what the tests ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.svgs = 0
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "id" in given:
            self.ids.append(given["id"] or "")
        self.links += [given[k] or "" for k in ("href", "src", "xlink:href") if k in given]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.svgs += tag == "svg"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if not {"style", "script", "svg"} & set(self.open):
            self.text += data


@pytest.fixture(scope="module")
def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_every_row_of_the_papers_is_there_without_any_script(read):
    bodies = [row for table in read.tables for row in table[1:]]
    assert len(read.tables[0]) == 1 + len(PAPERS[0].rows)
    for paper in PAPERS:
        for row in paper.rows:
            assert any(cells[0] == row.label and cells[1] == row.table for cells in bodies)
    assert ["CAT-S", "2", "37", "37.3", "agrees", "5.9", "6.06", "+0.16 [1]"] in bodies
    assert "the official code counts 6.06 too" in read.text
    assert "differ and say why, 0 differ without a reason" in read.text


def test_every_row_has_as_many_cells_as_its_heading(read):
    for table in read.tables:
        assert len({len(row) for row in table}) == 1
        assert len(table) > 1


def test_what_was_measured_is_there(read):
    bodies = [row for table in read.tables for row in table[1:]]
    assert ["cpsa 8x8x8", "float32", FORWARD, "2", "3.000"] in [row[:5] for row in bodies]
    assert any(row[0] == "cpsa <b>&7</b>" and row[-1] == "busy" for row in bodies)
    assert any(row[0] == "cpsa 6x9x8" and row[-1] == "wrong" for row in bodies)
    assert any(row[0] == "crossvit_15" and row[6:] == ["20.0", "10.0", "2.00", "640"]
               for row in bodies)  # fmt: skip
    assert any(row[0] == "ipsa fused" and row[-3:] == ["1.00", "1.40", "see below"]
               for row in bodies)  # fmt: skip
    assert ["cpsa 8x8x8", "float32", "3.0", html.DASH, "1.0"] in bodies
    assert "(last cache 32 MiB): the rate falls" in read.text
    assert "commit" in read.text


def test_newer_results_come_first(read):
    assert read.text.index("2026-01-02-machine") < read.text.index("2026-01-01-machine")


def test_the_page_needs_nothing_but_itself(page, read):
    assert all(link.startswith("#") for link in read.links)
    assert {link[1:] for link in read.links} <= set(read.ids)
    assert len(read.ids) == len(set(read.ids))
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", text)
    assert read.svgs == 2 + 2 + 2  # scaling over both, latency and roofline of two files


def test_the_page_is_the_same_every_time(page, results, tmp_path):
    again = tmp_path / "again.html"
    assert cli.main(["report", "--results", str(results), "--out", str(again)]) == 0
    assert again.read_bytes() == page.read_bytes()


def test_the_committed_results_are_read_by_default(tmp_path, capsys):
    out = tmp_path / "report.html"
    assert cli.main(["report", "--out", str(out)]) == 0
    reader = Reader()
    reader.feed(out.read_text(encoding="utf-8"))
    files = sorted(Path(report.__file__).parent.glob("results/*.json"))
    assert files
    for file in files:
        assert f"Measured: {file.stem}" in reader.text
    assert f"{len(files)} files of results" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda path: path / "no.json", "no results at", id="missing"),
        pytest.param(lambda path: path, "it has no *.json", id="empty-folder"),
        pytest.param(lambda path: Path(__file__), "is not JSON", id="not-json"),
    ],
)
def test_results_that_are_none_are_refused(make, message, tmp_path, capsys):
    out = tmp_path / "out.html"
    assert cli.main(["report", "--results", str(make(tmp_path)), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_row_with_a_cell_too_few_is_refused():
    with pytest.raises(ValueError, match="zip"):
        html.table(html.Table("caption", ("a", "b#"), [["only one"]]))


# ---- In a browser -------------------------------------------------------------------------------

TABLE = "[...document.querySelectorAll('table')].find(t => t.caption.textContent.includes('{}'))"
CASES = TABLE.format("Ours against the best plain")


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory):
    with Page(page, tmp_path_factory.mktemp("profile")) as one:
        one.resize(1200, 900, phone=False)
        yield one


def column(browser: Page, table: str, place: int) -> list[str]:
    return browser.run(f"[...({table}).tBodies[0].rows].map(r => r.cells[{place}].textContent)")


@needs_browser
def test_the_browser_finds_no_fault_and_asks_for_nothing_else(browser, page):
    assert browser.errors == []
    assert browser.requests == [page.as_uri()]
    assert browser.run("document.compatMode") == "CSS1Compat"
    assert browser.run("document.querySelectorAll('table button').length") > 50


@needs_browser
def test_a_click_on_a_heading_sorts_by_numbers_and_another_turns_it_round(browser):
    browser.run(f"({CASES}).closest('details').open = true")
    assert column(browser, CASES, 11)[:3] == ["12.50", "3.00", "101.00"]
    head = f"({CASES}).tHead.rows[0].cells[11].querySelector('button')"
    browser.click(head)
    assert column(browser, CASES, 11) == ["3.00", "12.50", "101.00", "busy", "wrong"]
    assert browser.run(f"({CASES}).tHead.rows[0].cells[11].getAttribute('aria-sort')") == (
        "ascending"
    )
    browser.click(head)
    assert column(browser, CASES, 11)[:3] == ["101.00", "12.50", "3.00"]
    assert set(column(browser, CASES, 11)[3:]) == {"busy", "wrong"}  # what is no number stays last
    browser.click(f"({CASES}).tHead.rows[0].cells[0].querySelector('button')")
    cells = column(browser, CASES, 0)
    assert cells == browser.run(f"{json.dumps(cells)}.sort((a, b) => a.localeCompare(b))")
    assert browser.run(f"({CASES}).querySelectorAll('[aria-sort]').length") == 1


@needs_browser
def test_a_phone_scrolls_tables_and_not_the_page(browser):
    browser.resize(390, 844, phone=True)
    try:
        assert browser.run("document.documentElement.scrollWidth") <= 390
        boxes = "[...document.querySelectorAll('.scroll')]"
        assert browser.run(f"{boxes}.some(box => box.scrollWidth > box.clientWidth)")
        first = f"({TABLE.format('CoaT')}).tBodies[0].rows[0].cells[0]"
        browser.run(f"({first}).closest('.scroll').scrollLeft = 100")
        assert browser.run(f"({first}).getBoundingClientRect().left") >= 0  # the names stay
        assert browser.run("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
        svg = "document.querySelector('figure svg').getBoundingClientRect().width"
        assert 250 < browser.run(svg) <= 390
    finally:
        browser.resize(1200, 900, phone=False)


def luminance(colour: str) -> float:
    """Relative luminance of rgb(...), as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_plots_can_be_read_in_light_and_dark(browser, scheme):
    browser.prefer(scheme)
    paper = luminance(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert (paper < 0.1) == (scheme == "dark")
    for selector, property in (
        ("body", "color"),
        ("td.good", "color"),
        ("td.warn", "color"),
        ("td.bad", "color"),
        (".notes", "color"),
        ("th", "color"),
        ("nav a", "color"),
        ("figure svg text", "fill"),
    ):
        element = f"document.querySelector('{selector}')"
        ink = luminance(browser.run(f"getComputedStyle({element}).{property}"))
        contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert contrast >= 4.5, (selector, scheme, contrast)
