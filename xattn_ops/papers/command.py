"""``python -m xattn_ops flops``: parameters and MACs beside what the papers print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from xattn_ops import flops
from xattn_ops.models import list_models
from xattn_ops.papers import PAPERS, operators
from xattn_ops.papers.measure import available, measure, on_meta, side_of
from xattn_ops.papers.table import Paper, Row
from xattn_ops.papers.verdict import Verdict, judge

CONVENTIONS = (
    "MACs are multiply-accumulates, which the papers call FLOPs: one MAC is two floating-point "
    "operations.",
    "Counted are matrix products and convolutions of the papers' algorithm, one image, padding "
    "included where a map is padded; no softmax, bias or normalisation.",
    "Kernels that absorb projections into each other execute fewer (column `executed`).",
)


def main(args: argparse.Namespace, console: Console) -> int:
    """Print the tables; the exit status is 1 if a figure differs without a reason.

    Raises:
        ValueError: a model that does not exist, or a depth below 1.
    """
    for name in args.models:
        if name not in list_models():
            raise ValueError(f"no model {name!r}; there are {', '.join(list_models())}")
    if args.depth < 1:
        raise ValueError(f"--depth must be at least 1, got {args.depth}")
    counted = [] if args.models else [operators.count(form) for form in operators.FORMS]
    if counted:
        console.print(operator_table(counted))
    for one in counted:
        if one.form.note:
            console.print(f"  {one.form.name}: {one.form.note}", markup=False)
    lines = judged_lines(args.models)
    for paper in PAPERS:
        _print_paper(paper, [line for line in lines if line.paper is paper], console)
    for name in args.models:
        console.print(module_table(name, args.depth))
    console.print(summary(lines))
    for line in CONVENTIONS:
        console.print(f"[dim]{line}[/]")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(to_json(lines, counted), indent=1) + "\n")
        console.print(f"wrote {args.json}")
    fine = all(verdict.explained for line in lines for verdict in line.verdicts)
    return 0 if fine and all(one.agrees for one in counted) else 1


@dataclass(frozen=True)
class Line:
    """A row of a paper with the verdicts on its parameters and MACs; none without a model."""

    paper: Paper
    row: Row
    verdicts: tuple[Verdict, ...]


def judged_lines(models: Sequence[str] = ()) -> list[Line]:
    """Every row of the papers, or those of some models."""
    return [
        Line(paper, row, judge(row, measure(row)) if available(row) else ())
        for paper in PAPERS
        for row in paper.rows
        if not models or row.model in models
    ]


def operator_table(counted: Sequence[operators.Counted]) -> Table:
    """The closed forms beside their counts, in millions of MACs."""
    out = Table(title="Operators: closed forms and counts (MMACs of one image)")
    for title in ("operator", "source", "formula", "at"):
        out.add_column(title)
    for title in ("paper", "formula", "counter", "reference", "executed"):
        out.add_column(title, justify="right")
    for one in counted:
        form = one.form
        figures = (form.macs, one.counter, one.reference, form.executed)
        cells = ["-" if n is None else f"{n / 1e6:.2f}" for n in figures]
        printed = "-" if form.printed is None else f"{form.printed} G"
        style = None if one.agrees else "red"
        out.add_row(form.name, form.source, form.formula, form.shape, printed, *cells, style=style)
    return out


def _print_paper(paper: Paper, lines: list[Line], console: Console) -> None:
    """One table a paper, its reasons numbered below."""
    if not lines:
        return
    notes: dict[str, int] = {}
    out = Table(title=f"{paper.title}: the paper's tables and what is counted")
    out.add_column("table", justify="right")
    out.add_column("model")
    for title in ("M params", "counted", "", "GMACs", "counted", ""):
        out.add_column(title, justify="right" if title else "left", no_wrap=True)
    last = lines[0].row.table
    for line in lines:
        row = line.row
        if last != row.table:
            out.add_section()
        last = row.table
        cells = [text for verdict in line.verdicts for text in _cells(verdict, notes)]
        out.add_row(row.table, row.label, *(cells or _missing(row)))
    console.print(out)
    for note, number in notes.items():
        console.print(f"  [{number}] {note}", markup=False)
    for note in paper.notes:
        console.print(f"  {note}", markup=False)


def _cells(verdict: Verdict, notes: dict[str, int]) -> tuple[str, str, str]:
    """Printed, counted, and the verdict with the number of its note."""
    number = notes.setdefault(verdict.note, len(notes) + 1) if verdict.note else None
    colour = "green" if verdict.agrees else "yellow" if verdict.explained else "red"
    if verdict.printed is None:
        return "-", verdict.shown, ""
    mark = f"[{colour}]{verdict.mark}[/]" + (f" \\[{number}]" if number else "")
    return verdict.printed, verdict.shown, mark


def _missing(row: Row) -> list[str]:
    """A row whose model this version does not have."""
    words = [(cell.printed or "-", "-", "not in this version") for cell in (row.params, row.macs)]
    return [text for one in words for text in one]


def module_table(name: str, depth: int) -> Table:
    """MACs of a model by module, down to a depth."""
    side = side_of(name)
    model = on_meta(name, {})
    macs = flops.count(model, (1, 3, side, side))
    out = Table(title=f"{name} at {side} x {side}: MACs by module")
    out.add_column("module")
    for title in ("params (M)", "MMACs", "share"):
        out.add_column(title, justify="right")
    for key, module in model.named_modules():
        if key.count(".") >= depth:
            continue
        if key in macs:
            params = sum(p.numel() for p in module.parameters()) / 1e6
            share = macs[key] / macs[""]
            out.add_row(key or "all", f"{params:.2f}", f"{macs[key] / 1e6:.1f}", f"{share:.1%}")
    return out


def summary(lines: Sequence[Line]) -> str:
    """How many cells agree, and how many differ with and without a reason."""
    cells = [verdict for line in lines for verdict in line.verdicts if verdict.printed]
    agree = sum(verdict.agrees for verdict in cells)
    explained = sum(verdict.explained and not verdict.agrees for verdict in cells)
    missing = sum(not line.verdicts for line in lines)
    words = (
        f"{agree} of {len(cells)} printed figures agree to their digits, {explained} differ and "
        f"say why, {len(cells) - agree - explained} differ without a reason"
    )
    return words + (f"; {missing} rows have no model in this version" if missing else "")


def to_json(lines: Sequence[Line], counted: Sequence[operators.Counted]) -> dict[str, Any]:
    """Everything that the tables show."""
    rows = [
        {
            "paper": line.paper.title,
            "table": line.row.table,
            "label": line.row.label,
            "model": line.row.model,
            "options": dict(line.row.options),
            "side": line.row.side,
            "params": asdict(line.verdicts[0]) if line.verdicts else None,
            "gmacs": asdict(line.verdicts[1]) if line.verdicts else None,
        }
        for line in lines
    ]
    forms = [
        {
            "operator": one.form.name,
            "source": one.form.source,
            "shape": one.form.shape,
            "macs": one.form.macs,
            "counter": one.counter,
            "reference": one.reference,
            "executed": one.form.executed,
        }
        for one in counted
    ]
    return {"rows": rows, "operators": forms}
