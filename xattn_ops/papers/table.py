"""A paper, the rows of its tables, and the figures in their cells.

The files of data are written with `row` and, for a cell that does not simply agree, one of `cut`,
`without_embeddings`, `with_elementwise` and `differs`. Tests hold every cell to what it says, so a
reason that is no longer needed fails as a figure that is wrong does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

PLAIN = ""
WITHOUT_EMBEDDINGS = "without class tokens and position embeddings"
WITH_ELEMENTWISE = "with 5 for each element of a LayerNorm and 1 for each of a GELU"


@dataclass(frozen=True)
class Cell:
    """One printed figure: millions of parameters, or GMACs.

    printed: as the paper has it; None where it prints none.
    basis: which count it is: PLAIN (all parameters; products and convolutions),
        WITHOUT_EMBEDDINGS or WITH_ELEMENTWISE.
    cut: further digits are cut off where other cells are rounded.
    reason: why no count agrees; "" where one does.
    """

    printed: str | None
    basis: str = PLAIN
    cut: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table: the model it stands for, and its figures.

    options: beyond the model's own, as `create_model` takes them.
    side: of the image that is counted.
    throughput: images/s that the paper measured; None where it gives none.
    """

    table: str
    label: str
    model: str
    params: Cell
    macs: Cell
    options: Mapping[str, Any] = field(default_factory=dict)
    side: int = 224
    throughput: int | None = None


@dataclass(frozen=True)
class Paper:
    """The tables of one paper that give figures of its own models."""

    key: str
    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def row(
    table: str,
    label: str,
    model: str,
    params: str | Cell | None,
    macs: str | Cell | None,
    options: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Row:
    """A `Row`; a figure that agrees is given as it is printed."""
    return Row(table, label, model, _cell(params), _cell(macs), options or {}, **rest)


def cut(cell: str | Cell) -> Cell:
    """The paper cuts digits off here."""
    return replace(_cell(cell), cut=True)


def without_embeddings(printed: str) -> Cell:
    """The paper leaves class tokens and position embeddings out here."""
    return Cell(printed, basis=WITHOUT_EMBEDDINGS)


def with_elementwise(printed: str) -> Cell:
    """The paper counts elementwise terms too."""
    return Cell(printed, basis=WITH_ELEMENTWISE)


def differs(printed: str, reason: str) -> Cell:
    """No count agrees, and this is what is known of why."""
    return Cell(printed, reason=reason)


def _cell(figure: str | Cell | None) -> Cell:
    return figure if isinstance(figure, Cell) else Cell(figure)
