"""The results as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from xattn_ops import _library
from xattn_ops._version import __version__
from xattn_ops.benchmarks.memory import Peak
from xattn_ops.benchmarks.roofline import Roofline
from xattn_ops.benchmarks.runner import Row

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
MIB = 1 << 20


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "isa": _library.isa() or "none: the native library is not loaded",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "xattn_ops": __version__,
        },
        "commit": commit(),
    }


def cpu_name() -> str:
    """The CPU's model string."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields: dict[str, str] = {}
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        if "model name" in fields:
            family = f", family {fields['cpu family']}" if "cpu family" in fields else ""
            model = f" model {fields['model']}" if "model" in fields else ""
            return fields["model name"] + family + model
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the checkout that runs, "-dirty" if files differ from it; None if installed."""
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def to_json(
    rows: Sequence[Row],
    peaks: Sequence[Peak],
    roofline: Roofline,
    threads: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "machine": machine(threads),
        "settings": settings,
        "roofline": roofline.to_dict(),
        "rows": [row.to_dict() for row in rows],
        "memory": [vars(peak) for peak in peaks],
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def table(rows: Sequence[Row]) -> Table:
    """One line a row; `x eager` and the like say how many times faster ours is."""
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row.baselines))
    out = Table(title="Ours against plain PyTorch (ratio of medians, above 1 ours is faster)")
    for title in ("case", "dtype", "pass"):
        out.add_column(title, no_wrap=True)
    for title in ("ms", "spread", "GFLOP/s", "GB/s", "roof"):
        out.add_column(title, justify="right", no_wrap=True)
    for name in names:
        out.add_column(f"x {name}", justify="right", no_wrap=True)
    out.add_column("x best", justify="right", style="bold", no_wrap=True)
    for row in rows:
        label = f"{row.operator} {row.shape}" + (f" {row.variant}" * (row.variant != "fused"))
        head = [label, _short(row.dtype), row.direction]
        if row.timing is None:
            out.add_row(*head, *["-"] * (len(names) + 5), "[red]wrong")
            continue
        figures = [
            f"{row.timing.median * 1e3:.3f}",
            f"{row.timing.spread:.0%}",
            f"{row.gflops:.0f}",
            f"{row.gbps:.1f}",
            _share(row),
        ]
        ratios = [f"{row.ratios[name]:.2f}" if name in row.ratios else "-" for name in names]
        best = "[yellow]busy" if row.best_ratio is None else f"{row.best_ratio:.2f}"
        out.add_row(*head, *figures, *ratios, best)
    return out


def memory_table(peaks: Sequence[Peak]) -> Table:
    """Peak of a training step beyond its operands, by variant, also for each token."""
    from rich.table import Table

    out = Table(title="Peak memory of a training step beyond its operands (MiB, fresh process)")
    out.add_column("case", no_wrap=True)
    out.add_column("dtype", no_wrap=True)
    variants = list(dict.fromkeys(peak.variant for peak in peaks))
    by_token = [f"{variant}, bytes a token" for variant in variants]
    for title in (*variants, "output and gradients", "one N x N tensor", *by_token):
        out.add_column(title, justify="right")
    cells: dict[tuple[str, str, str], dict[str, Peak]] = {}
    for peak in peaks:
        cells.setdefault((peak.operator, peak.shape, peak.dtype), {})[peak.variant] = peak
    for (operator, shape, dtype), by_variant in cells.items():
        some = next(iter(by_variant.values()))
        found = [by_variant.get(variant) for variant in variants]
        figures = ["-" if one is None else _mib(one.peak_bytes) for one in found]
        dense = _mib(some.dense_bytes) if some.dense_bytes else "-"
        figures += [_mib(some.result_bytes), dense]
        for one in found:
            share = None if one is None else one.bytes_per_token
            figures.append("-" if share is None else f"{share:.0f}")
        out.add_row(f"{operator} {shape}", _short(dtype), *figures)
    return out


def markdown(rows: Sequence[Row]) -> str:
    """The ratios to the best baseline as README shows them: one line an operator and dtype.

    A line more for each baseline that is reported apart.
    """
    passes = list(dict.fromkeys(row.direction for row in rows))
    cells: dict[str, dict[str, list[str]]] = {}
    shapes: dict[str, list[str]] = {}
    for row in rows:
        name = f"{row.operator} {row.dtype}" + (f", {row.variant}" * (row.variant != "fused"))
        found = {name: row.best_ratio}
        found |= {f"{name}, over {other}": row.ratios.get(other) for other in row.apart}
        for line, ratio in found.items():
            cell = (row.refused or "busy").split(":")[0] if ratio is None else f"{ratio:.1f}"
            cells.setdefault(line, {}).setdefault(row.direction, []).append(cell)
            shapes.setdefault(line, []).append(row.shape)
    lines = ["| | shapes | " + " | ".join(passes) + " |", "|---" * (2 + len(passes)) + "|"]
    for name, by_pass in cells.items():
        ratios = [" / ".join(by_pass.get(one, ["-"])) for one in passes]
        lines.append(
            f"| {name} | {' / '.join(dict.fromkeys(shapes[name]))} | {' | '.join(ratios)} |"
        )
    return "\n".join(lines) + "\n"


def notes(rows: Sequence[Row]) -> list[str]:
    """What the table has no room for: refusals and baselines that did not run."""
    lines: dict[str, None] = {}
    for row in rows:
        where = f"{row.operator} {row.shape} {_short(row.dtype)} {row.direction}"
        if row.refused:
            lines[f"{where}: no ratio ({row.refused})"] = None
        for name, why in row.skipped.items():
            if why != "left out":
                lines[f"{where}: {name} did not run ({why})"] = None
    return list(lines)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """How long each takes in units of ours: a panel for each operator, dtype and direction."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.timing is not None:
            panels.setdefault((row.operator, row.dtype, row.direction), []).append(row)
    if not panels:
        raise ValueError("nothing was timed, so there is nothing to plot")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len({row.shape for row in members}) for members in panels.values())
    width = max(4.6, 1.15 * most)  # a shape's label needs an inch
    figure = Figure(figsize=(width * columns, 3.2 * lines), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, ((operator, dtype, direction), members) in zip(axes, panels.items(), strict=False):
        _bars(axis, members)
        axis.set_title(f"{operator}, {dtype}, {direction}", fontsize=10)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


COLOURS = {
    "fused": "#0b7a75",
    "fused + compile": "#5fb49c",
    "eager": "#b0b7bf",
    "sdpa": "#8894a1",
    "nhwc": "#8894a1",
    "compile": "#5d6b7a",
    "sdpa + compile": "#46525f",
    "nhwc + compile": "#46525f",
    "flex": "#d8b365",
    "absorbed": "#c9a0a0",
}


def _bars(axis: Any, rows: list[Row]) -> None:
    """Grouped bars of time in units of ours, which stands at 1 with its milliseconds."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    ours = {row.shape: row.timing.median for row in reversed(rows) if row.timing is not None}
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        assert row.timing is not None
        times.setdefault(row.variant, {})[row.shape] = row.timing.median
        for name, timing in row.baselines.items():
            times.setdefault(name, {})[row.shape] = timing.median
    width = 0.8 / len(times)
    for i, (name, by_shape) in enumerate(times.items()):
        places = [shapes.index(shape) + (i - (len(times) - 1) / 2) * width for shape in by_shape]
        heights = [median / ours[shape] for shape, median in by_shape.items()]
        axis.bar(places, heights, width, label=name, color=COLOURS.get(name))
    busy = {row.shape for row in rows if row.best_ratio is None}
    labels = [f"{s}\n{ours[s] * 1e3:.2f} ms" + "\n(busy)" * (s in busy) for s in shapes]
    axis.set_xticks(range(len(shapes)), labels, fontsize=8)
    axis.set_ylabel("time / ours")
    axis.axhline(1, color=COLOURS["fused"], linewidth=0.8)
    axis.set_ylim(0, 1.25 * max(max(t / ours[s] for s, t in b.items()) for b in times.values()))
    axis.legend(fontsize=7, ncols=len(times), frameon=False, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)


def _share(row: Row) -> str:
    if row.roofline_share is None or row.best_ratio is None:
        return "-"  # the machine was too busy to measure the roofline, or the row
    return f"{row.roofline_share:.0%}"


def _short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "f")


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f}"
