"""The tables of the page, from what was counted and what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from xattn_ops.benchmarks.memory import Peak
from xattn_ops.benchmarks.report import sweep_notes
from xattn_ops.benchmarks.runner import Row
from xattn_ops.benchmarks.sweep import Sweep
from xattn_ops.benchmarks.throughput import Rate
from xattn_ops.papers.command import Line
from xattn_ops.papers.operators import Counted
from xattn_ops.papers.table import Paper
from xattn_ops.papers.verdict import Verdict
from xattn_ops.report.html import DASH, Cell, Table, number
from xattn_ops.report.html import Line as Cells

MIB = 1 << 20
BUSY = Cell("busy", kind="warn")


def paper(one: Paper, lines: Sequence[Line]) -> Table:
    """The rows of a paper's tables, each figure beside its count."""
    notes: dict[str, int] = {}
    verdict = ("counted#", "verdict")
    columns = ("model", "table#", "M params#", *verdict, "GMACs#", *verdict)
    rows: list[Cells] = [
        [line.row.label, Cell(line.row.table, float(line.row.table)), *_figures(line, notes)]
        for line in lines
    ]
    numbered = [f"[{number}] {note}" for note, number in notes.items()]
    return Table(f"{one.title}: printed and counted", columns, rows, [*numbered, *one.notes])


def _figures(line: Line, notes: dict[str, int]) -> list[Cell]:
    if not line.verdicts:
        cells = []
        for cell in (line.row.params, line.row.macs):
            printed = (
                Cell(DASH) if cell.printed is None else Cell(cell.printed, float(cell.printed))
            )
            cells += [printed, Cell(DASH), Cell("not in this version", kind="dim")]
        return cells
    return [cell for verdict in line.verdicts for cell in _verdict(verdict, notes)]


def _verdict(verdict: Verdict, notes: dict[str, int]) -> list[Cell]:
    ours = Cell(verdict.shown, verdict.counted)
    if verdict.printed is None:
        return [Cell(DASH), ours, Cell("")]
    place = f" [{notes.setdefault(verdict.note, len(notes) + 1)}]" if verdict.note else ""
    kind = "good" if verdict.agrees else "warn" if verdict.explained else "bad"
    return [_printed(verdict.printed), ours, Cell(verdict.mark + place, kind=kind)]


def _printed(figure: str | None) -> Cell:
    return Cell(DASH) if figure is None else Cell(figure, float(figure))


def operators(counted: Sequence[Counted]) -> Table:
    """The closed forms beside their counts."""
    columns = (
        "operator", "source", "formula", "at", "paper", "formula#", "counter#", "reference#",
        "executed#",
    )  # fmt: skip
    rows: list[Cells] = []
    for one in counted:
        form = one.form
        figures = (form.macs, one.counter, one.reference, form.executed)
        cells = [number(None if n is None else n / 1e6, 2) for n in figures]
        printed = DASH if form.printed is None else f"{form.printed} G"
        rows.append([form.name, form.source, form.formula, form.shape, printed, *cells])
    notes = [f"{one.form.name}: {one.form.note}" for one in counted if one.form.note]
    return Table("Operators: closed forms and counts, MMACs of one image", columns, rows, notes)


def cases(rows: Sequence[Row], caption: str) -> Table:
    """What the benchmark measured, ours against the best plain formulation."""
    columns = (
        "case", "dtype", "pass", "batch#", "ms#", "spread#", "GFLOP/s#", "GB/s#", "roof#",
        "best plain", "ms#", "times faster#",
    )  # fmt: skip
    lines: list[Cells] = []
    for row in rows:
        head: list[Cell | str] = [row.label, row.dtype, row.direction]
        head.append(Cell(str(row.batch), row.batch))
        if row.timing is None:
            lines.append([*head, *[Cell(DASH)] * 7, Cell("wrong", kind="bad")])
            continue
        share = row.roofline_share
        figures = [
            number(row.timing.median * 1e3, 3),
            number(row.timing.spread * 100, 0, " %"),
            number(row.gflops, 0),
            number(row.gbps, 1),
            number(None if share is None else share * 100, 0, " %"),
        ]
        best = min(row.baselines, key=lambda name: row.baselines[name].median, default=DASH)
        plain = number(row.baselines[best].median * 1e3 if row.baselines else None, 3)
        ratio = BUSY if row.best_ratio is None else number(row.best_ratio, 2)
        lines.append([*head, *figures, best, plain, ratio])
    return Table(caption, columns, lines)


def memory(peaks: Sequence[Peak]) -> Table:
    """Peak of a training step, ours beside eager."""
    cells: dict[tuple[str, str, str], dict[str, Peak]] = {}
    for peak in peaks:
        cells.setdefault((peak.operator, peak.shape, peak.dtype), {})[peak.variant] = peak
    rows: list[Cells] = []
    for (operator, shape, dtype), found in cells.items():
        some = next(iter(found.values()))
        by = [found.get(variant) for variant in ("fused", "eager")]
        peaked = [number(None if one is None else one.peak_bytes / MIB, 1) for one in by]
        rows.append([f"{operator} {shape}", dtype, *peaked, number(some.result_bytes / MIB, 1)])
    columns = ("case", "dtype", "ours#", "eager#", "output and gradients#")
    return Table("Peak memory of a training step beyond its operands, MiB", columns, rows)


def sweeps(found: Sequence[Sweep]) -> Table:
    """Fitted exponents beside the papers'."""
    columns = (
        "operator", "dtype", "pass", "over", "the paper", "sizes", "paper#", "fitted#", "verdict",
    )  # fmt: skip
    rows: list[Cells] = []
    for one in found:
        head = [f"{one.operator} {one.variant}", one.dtype, one.direction, one.over, one.complexity]
        if one.fit is None:
            rows.append([*head, DASH, Cell(DASH), Cell(DASH), BUSY])
            continue
        sizes = f"{one.fit.sizes[0]} to {one.fit.sizes[-1]}"
        agrees = one.fit.agrees
        verdict = Cell("agrees", kind="good") if agrees else Cell("see below", kind="warn")
        figures = [number(one.fit.paper, 2), number(one.fit.exponent, 2)]
        rows.append([*head, sizes, *figures, verdict])
    return Table("Growth of time: exponents", columns, rows, sweep_notes(found))


def throughput(rates: Sequence[Rate]) -> Table:
    """Images a second, in the order of CrossViT's Table 4."""
    columns = (
        "model", "dtype", "image#", "batch#", "M params#", "GMACs#", "images/s#", "plain#",
        "times faster#", "paper, V100, batch 64#",
    )  # fmt: skip
    rows: list[Cells] = [
        [
            one.model,
            one.dtype,
            number(one.side, 0),
            number(one.batch, 0),
            number(one.params / 1e6, 1),
            number(one.macs / 1e9, 1),
            number(one.images, 1),
            number(one.plain_images, 1),
            BUSY if one.ratio is None else number(one.ratio, 2),
            number(one.printed, 0),
        ]
        for one in rates
    ]
    return Table("Throughput of inference against the official formulation", columns, rows)
