"""Tables and sections as HTML; nothing here knows what they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """One cell. value: what it sorts by, where that is not its text; kind: its CSS class."""

    text: str
    value: float | None = None
    kind: str = ""


Line = Sequence[Cell | str]


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by each of its columns.

    columns: titles; those that end in "#" hold numbers, to the right.
    notes: lines below it.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Line]
    notes: Sequence[str] = ()


def number(value: float | None, digits: int, unit: str = "") -> Cell:
    """A figure, which sorts as such; a dash where there is none."""
    if value is None:
        return Cell(DASH)
    return Cell(f"{value:.{digits}f}{unit}", value)


def table(content: Table) -> str:
    """In a box that scrolls by itself where the screen is narrow."""
    heads = "".join(_head(title) for title in content.columns)
    rows = "\n".join(
        "<tr>"
        + "".join(_cell(cell, title) for cell, title in zip(row, content.columns, strict=True))
        + "</tr>"
        for row in content.rows
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in content.notes)
    return (
        '<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(content.caption)}">\n'
        f"<table>\n<caption>{escape(content.caption)}</caption>\n"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>\n"
        + (f'<ul class="notes">{notes}</ul>\n' if notes else "")
    )


def figure(svg: str, caption: str) -> str:
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>\n"


def section(name: str, title: str, *parts: str) -> str:
    return f'<section id="{escape(name)}">\n<h2>{escape(title)}</h2>\n{"".join(parts)}</section>\n'


def folded(title: str, *parts: str, unfolded: bool = False) -> str:
    """Shown when asked for."""
    state = " open" if unfolded else ""
    summary = f"<summary>{escape(title)}</summary>\n"
    return f"<details{state}>\n{summary}{''.join(parts)}</details>\n"


def _head(title: str) -> str:
    kind = ' class="number"' if title.endswith("#") else ""
    return f'<th scope="col"{kind}>{escape(title.removesuffix("#"))}</th>'


def _cell(cell: Cell | str, title: str) -> str:
    cell = Cell(cell) if isinstance(cell, str) else cell
    kinds = " ".join(["number"] * title.endswith("#") + [cell.kind] * bool(cell.kind))
    kind = f' class="{kinds}"' if kinds else ""
    value = "" if cell.value is None else f' data-value="{cell.value:.10g}"'
    return f"<td{kind}{value}>{escape(cell.text)}</td>"
