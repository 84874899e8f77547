"""Whether a printed figure is what is counted, to its last digit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xattn_ops.papers.measure import Measured
from xattn_ops.papers.table import PLAIN, Cell, Row


@dataclass(frozen=True)
class Verdict:
    """One cell judged.

    printed: the paper's figure, None where it prints none.
    counted: ours, on the basis that the cell names, in the cell's unit.
    agrees: to the printed digits.
    note: on what terms it agrees, or why it does not; "" where there is nothing to say.
    """

    printed: str | None
    counted: float
    agrees: bool
    note: str = ""

    @property
    def explained(self) -> bool:
        """Whether the cell agrees, or carries its reason."""
        return self.agrees or bool(self.note)

    @property
    def shown(self) -> str:
        """Ours with one digit more than the paper's."""
        return f"{self.counted:.{digits(self.printed) + 1}f}"

    @property
    def mark(self) -> str:
        """The verdict in a word."""
        if self.printed is None:
            return "not printed"
        return "agrees" if self.agrees else f"{self.counted - float(self.printed):+.2g}"


def judge(row: Row, measured: Measured) -> tuple[Verdict, Verdict]:
    """The verdicts on the parameters and on the MACs of a row."""
    params, macs = row.params, row.macs
    return (
        _judge(params, measured.params_on(params.basis) / 1e6),
        _judge(macs, measured.macs_on(macs.basis) / 1e9),
    )


def as_printed(value: float, printed: str, cut: bool = False) -> str:
    """The value with as many digits as the paper prints, rounded or cut off."""
    places = digits(printed)
    if cut:
        value = math.floor(value * 10**places) / 10**places
    return f"{value:.{places}f}"


def digits(printed: str | None) -> int:
    """Digits behind the point; two where the paper prints nothing, as ours then has three."""
    return 2 if printed is None else len(printed.partition(".")[2])


def _judge(cell: Cell, counted: float) -> Verdict:
    if cell.printed is None:
        return Verdict(None, counted, True)
    agrees = as_printed(counted, cell.printed, cell.cut) == cell.printed
    if not agrees:
        return Verdict(cell.printed, counted, False, cell.reason)
    terms = [cell.basis] if cell.basis != PLAIN else []
    if cell.cut:
        terms.append("cut off, not rounded")
    return Verdict(cell.printed, counted, True, ", ".join(terms))
