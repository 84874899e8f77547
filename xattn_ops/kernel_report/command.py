"""The command ``kernels``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from xattn_ops._tiles import ARCHITECTURES
from xattn_ops.kernel_report import cuda, triton
from xattn_ops.kernel_report.cards import CUDA_ARCHITECTURES

if TYPE_CHECKING:
    from rich.console import Console


def command(
    operators: Sequence[str],
    architectures: Sequence[str] | None,
    dtypes: Sequence[str],
    backends: Sequence[str],
    as_json: bool,
    sweep: bool,
    paper: bool,
    console: Console,
) -> int:
    """Print the tables, or JSON; 1 where a Triton kernel breaks a bound."""
    rows: list[triton.Figures] = []
    if "triton" in backends:
        names = operators or list(triton.CALLS)
        rows = list(triton.figures(names, architectures or ARCHITECTURES, dtypes, sweep, paper))
    of_cuda = (
        _cuda_rows(operators, architectures or CUDA_ARCHITECTURES, dtypes)
        if "cuda" in backends
        else []
    )
    if as_json:
        listed: list[dict[str, Any]] = [
            asdict(row) | {"resident": row.resident, "broken": row.broken} for row in rows
        ]
        print(json.dumps(listed + [asdict(row) for row in of_cuda], indent=1))
        return int(any(row.broken for row in rows))
    if rows:
        _print_triton(rows, console)
    if of_cuda:
        _print_cuda(of_cuda, console)
    elif "cuda" in backends:
        console.print("CUDA kernels: none are built for this; XATTN_BUILD_CUDA=1 builds them")
    return int(any(row.broken for row in rows))


def _cuda_rows(
    operators: Sequence[str], architectures: Sequence[str], dtypes: Sequence[str]
) -> list[cuda.CudaFigures]:
    path = cuda.library()
    if path is None:
        return []
    return [
        row
        for row in cuda.figures(path, architectures)
        if row.dtype in ("", *dtypes)
        if not operators or any(row.kernel.startswith(operator) for operator in operators)
    ]


def _print_triton(rows: Sequence[triton.Figures], console: Console) -> None:
    from rich.table import Table

    table = Table(title="Triton kernels, compiled ahead of time")
    for name in ("operator", "call", "kernel", "target", "dtype"):
        table.add_column(name)
    figures = "warps stages registers spilled shared resident matrix loads"
    for name in figures.split():
        table.add_column(name, justify="right")
    table.add_column("broken")
    for row in rows:
        loads = " ".join(f"{count}x{size}" for size, count in sorted(row.loads.items()))
        numbers = (row.warps, row.stages, row.registers, row.spilled, row.shared, row.resident)
        names = (row.operator, row.call, row.kernel, row.architecture, row.dtype)
        cells = (*names, *map(str, numbers), str(row.matrix), loads, "; ".join(row.broken))
        table.add_row(*cells, style=None if row.chosen else "dim")
    console.print(table)


def _print_cuda(rows: Sequence[cuda.CudaFigures], console: Console) -> None:
    from rich.table import Table

    table = Table(title="CUDA kernels, as built")
    for name in ("kernel", "target", "dtype"):
        table.add_column(name)
    for name in ("registers", "stack", "static shared", "matrix"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (row.registers, row.stack, row.shared, row.matrix)
        table.add_row(row.kernel, row.architecture, row.dtype, *map(str, numbers))
    console.print(table)
