"""The papers' printed figures, cell by cell, and the command that shows them."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from xattn_ops import cli
from xattn_ops.papers import PAPERS, command, judge, measure, operators
from xattn_ops.papers.measure import Measured, available
from xattn_ops.papers.table import PLAIN, WITH_ELEMENTWISE, Cell, Row
from xattn_ops.papers.verdict import as_printed

ROWS = [
    pytest.param(row, id=f"{paper.key} {row.table}: {row.label}")
    for paper in PAPERS
    for row in paper.rows
    if available(row)
]
KINDS = (("params", 1e6), ("macs", 1e9))


@pytest.mark.parametrize("row", ROWS)
def test_every_cell_is_what_its_paper_s_file_says(row):
    """It agrees on the terms that it names, and has a reason exactly where it does not agree."""
    verdicts = judge(row, measure(row))
    for cell, verdict in zip((row.params, row.macs), verdicts, strict=True):
        assert verdict.agrees != bool(cell.reason), verdict
        assert verdict.explained


@pytest.mark.parametrize("row", ROWS)
def test_no_cell_names_terms_that_it_does_not_need(row):
    """Where digits are cut off, embeddings left out or elementwise terms counted, it shows."""
    measured = measure(row)
    for kind, unit in KINDS:
        cell = getattr(row, kind)
        counted = getattr(measured, f"{kind}_on")
        if cell.basis != PLAIN:
            assert as_printed(counted() / unit, cell.printed, cell.cut) != cell.printed
        if cell.cut:
            assert as_printed(counted(cell.basis) / unit, cell.printed) != cell.printed


@pytest.mark.parametrize(
    ("key", "tables", "rows"),
    [
        pytest.param("cat", "2", 3, id="cat"),
        pytest.param("cabvit", "124", 14, id="cabvit"),
        pytest.param("coat", "12567", 27, id="coat"),
        pytest.param("crossvit", "23467", 31, id="crossvit"),
    ],
)
def test_the_tables_that_are_there(key, tables, rows):
    (paper,) = [paper for paper in PAPERS if paper.key == key]
    assert sorted({row.table for row in paper.rows}) == list(tables)
    assert len(paper.rows) == rows


def test_one_way_of_counting_prints_all_gmacs_of_coat_but_one():
    """As the paper's note says: with elementwise terms, which the paper does not mention."""
    (paper,) = [paper for paper in PAPERS if paper.key == "coat"]
    printed = [row for row in paper.rows if row.macs.printed]
    others = [
        row.label
        for row in printed
        if as_printed(measure(row).macs_on(WITH_ELEMENTWISE) / 1e9, row.macs.printed)
        != row.macs.printed
    ]
    assert others == ["Lite Mini w/o relative"]


def test_the_products_of_attention_in_cat():
    """What the reason for CAT-S's cell says of the other two models."""
    (paper,) = [paper for paper in PAPERS if paper.key == "cat"]
    left = {}
    for row, width in zip(paper.rows, (64, 96, 96), strict=True):
        blocks = (1, 1, 6 if row.model == "cat_base" else 3, 1)
        products = 0
        for stage, (side, depth) in enumerate(zip((56, 28, 14, 7), blocks, strict=True)):
            pixels, channels = side * side, width * 2**stage
            windows = 2 * pixels * 49 * channels  # q k^T and the product with v of one IPSA
            patches = 2 * (pixels // 49) * pixels * channels  # of one CPSA
            products += depth * (2 * windows + patches)
        left[row.label] = f"{(measure(row).macs - products) / 1e9:.2f}"
    assert left == {"CAT-T": "2.65", "CAT-S": "5.88", "CAT-B": "8.70"}


# ---- Verdicts -----------------------------------------------------------------------------------

MEASURED = Measured(10_660_000, 100_000, 1_960_000_000, 5_000_000, 3_000_000)


@pytest.mark.parametrize(
    ("params", "macs", "marks", "notes"),
    [
        pytest.param(Cell("10.7"), Cell("2.0"), ["agrees"] * 2, ["", ""], id="rounded"),
        pytest.param(Cell("11"), Cell("1.96"), ["agrees"] * 2, ["", ""], id="other-digits"),
        pytest.param(
            Cell("10.6", cut=True),
            Cell("1.9", cut=True),
            ["agrees"] * 2,
            ["cut off, not rounded"] * 2,
            id="cut",
        ),
        pytest.param(Cell(None), Cell(None), ["not printed"] * 2, ["", ""], id="nothing-printed"),
        pytest.param(
            Cell("11.5", reason="a reason"),
            Cell("1.8"),
            ["-0.84", "+0.16"],
            ["a reason", ""],
            id="differs",
        ),
    ],
)
def test_verdicts(params, macs, marks, notes):
    verdicts = judge(Row("1", "A", "a", params, macs), MEASURED)
    assert [verdict.mark for verdict in verdicts] == marks
    assert [verdict.note for verdict in verdicts] == notes
    assert [verdict.explained for verdict in verdicts] == [
        mark in ("agrees", "not printed") or bool(note)
        for mark, note in zip(marks, notes, strict=True)
    ]


def test_ours_is_shown_with_a_digit_more():
    verdicts = judge(Row("1", "A", "a", Cell("11"), Cell("1.96")), MEASURED)
    assert [verdict.shown for verdict in verdicts] == ["10.7", "1.960"]


def test_elements_are_counted_where_they_leave_their_layers():
    """CoaT-Lite Tiny: two LayerNorms a block, one of patches a stage, one of the class token."""
    measured = measure(Row("", "", "coat_lite_tiny", Cell(None), Cell(None)))
    scales = ((56, 64, 8), (28, 128, 8), (14, 256, 4), (7, 320, 4))
    tokens = [(1 + side * side, dim, ratio) for side, dim, ratio in scales]
    assert measured.activated == sum(2 * n * ratio * dim for n, dim, ratio in tokens)
    patches = sum((n - 1) * dim for n, dim, _ in tokens)
    assert measured.normalised == sum(2 * 2 * n * dim for n, dim, _ in tokens) + patches + 320


# ---- Operators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [pytest.param(form, id=form.name) for form in operators.FORMS])
def test_closed_form_counter_and_reference_are_one_number(form):
    counted = operators.count(form)
    assert counted.counter == form.macs
    assert counted.reference == form.macs
    assert counted.agrees
    if form.printed is not None:
        assert as_printed(form.macs / 1e9, form.printed) == form.printed
    if form.executed is not None:
        assert form.executed < form.macs


# ---- The command --------------------------------------------------------------------------------


def test_the_command_shows_every_row_and_writes_json(tmp_path, capsys):
    path = tmp_path / "new" / "flops.json"
    assert cli.main(["flops", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    for words in ("2003.83", "145.11", "97.54", "68.27", "CAT-S", "+0.16 [1]", "18†@480", "56.60"):
        assert words in out
    assert "differ and say why, 0 differ without a reason" in out
    assert "one MAC is two floating-point" in out
    data = json.loads(path.read_text())
    assert len(data["rows"]) == sum(len(paper.rows) for paper in PAPERS)
    (small,) = [row for row in data["rows"] if row["label"] == "CAT-S"]
    assert small["gmacs"]["printed"] == "5.9"
    assert small["gmacs"]["counted"] == pytest.approx(6.0632, abs=5e-5)
    assert not small["gmacs"]["agrees"]
    assert small["params"]["agrees"]
    assert {one["operator"] for one in data["operators"]} == {f.name for f in operators.FORMS}


def test_the_command_shows_the_modules_of_a_model(capsys):
    assert cli.main(["flops", "coat_lite_tiny", "--depth", "1"]) == 0
    out = capsys.readouterr().out
    assert "coat_lite_tiny at 224 x 224" in out
    assert "serial_blocks1" in out
    assert "CAT-S" not in out
    assert "conv-relative" not in out


def test_a_model_is_counted_at_its_own_image_size(capsys):
    assert cli.main(["flops", "crossvit_15_dagger_384"]) == 0
    assert "crossvit_15_dagger_384 at 384 x 384" in capsys.readouterr().out


def test_a_figure_without_a_reason_fails_the_command(monkeypatch, capsys):
    paper = PAPERS[0]
    wrong = replace(paper.rows[0], macs=Cell("9.9"))
    monkeypatch.setattr(command, "PAPERS", (replace(paper, rows=(wrong,)),))
    assert cli.main(["flops", "cat_tiny"]) == 1
    out = capsys.readouterr().out
    assert "-7.1" in out
    assert "1 differ without a reason" in out


def test_a_counter_that_disagrees_fails_the_command(monkeypatch):
    form = replace(operators.FORMS[1], macs=operators.FORMS[1].macs + 1)
    monkeypatch.setattr(operators, "FORMS", (form,))
    monkeypatch.setattr(command, "PAPERS", ())
    assert cli.main(["flops"]) == 1


def test_rows_whose_model_is_not_there_say_so(monkeypatch, capsys):
    paper = PAPERS[0]
    ghost = replace(paper.rows[0], model="cat_ghost")
    monkeypatch.setattr(command, "PAPERS", (replace(paper, rows=(ghost,)),))
    monkeypatch.setattr(operators, "FORMS", ())
    assert cli.main(["flops"]) == 0
    out = capsys.readouterr().out
    assert out.count("not in this version") == 2
    assert "1 rows have no model in this version" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["cat_huge"], "no model 'cat_huge'; there are cabvit_h_l1", id="model"),
        pytest.param(["cat_tiny", "--depth", "0"], "--depth must be at least 1, got 0", id="depth"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, capsys):
    assert cli.main(["flops", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_counting_needs_no_memory_for_the_weights():
    model = command.on_meta("cat_tiny", {})
    assert {p.device for p in model.parameters()} == {torch.device("meta")}
    assert isinstance(command.module_table("cat_tiny", 1).row_count, int)
    Console(quiet=True).print(command.module_table("cat_tiny", 2))
