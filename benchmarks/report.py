"""The results as tables and as JSON."""

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
from xattn_ops.benchmarks import device as devices
from xattn_ops.benchmarks.compare import Change
from xattn_ops.benchmarks.memory import Peak
from xattn_ops.benchmarks.roofline import Roofline
from xattn_ops.benchmarks.runner import Row
from xattn_ops.benchmarks.sweep import Sweep
from xattn_ops.benchmarks.throughput import Rate

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 2  # 1: rows without device, cache and MACs; no sweeps, no throughput
MIB = 1 << 20


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "cpu": cpu_name(),
        "accelerator": devices.name(device),
        "cache_bytes": devices.cache_bytes(device),
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
    sweeps: Sequence[Sweep] = (),
    rates: Sequence[Rate] = (),
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "machine": machine(threads, roofline.device),
        "settings": settings,
        "roofline": roofline.to_dict(),
        "rows": [row.to_dict() for row in rows],
        "memory": [vars(peak) for peak in peaks],
        "sweeps": [sweep.to_dict() for sweep in sweeps],
        "throughput": [rate.to_dict() for rate in rates],
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
        head = [row.label, _short(row.dtype), row.direction]
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


def sweep_table(sweeps: Sequence[Sweep]) -> Table:
    """The fitted exponents beside the papers'."""
    from rich.table import Table

    out = Table(title="Growth of time: fitted exponent beside that of the paper's MACs")
    for title in ("operator", "dtype", "pass", "over", "sizes fitted", "the paper"):
        out.add_column(title, no_wrap=True)
    for title in ("paper", "fitted", ""):
        out.add_column(title, justify="right", no_wrap=True)
    for sweep in sweeps:
        head = [f"{sweep.operator} {sweep.variant}", _short(sweep.dtype), sweep.direction]
        found = sweep.fit
        if found is None:
            out.add_row(*head, sweep.over, "-", sweep.complexity, "-", "-", "[yellow]busy")
            continue
        sizes = f"{found.sizes[0]} to {found.sizes[-1]}"
        verdict = "[green]agrees" if found.agrees else "[yellow]see below"
        figures = (f"{found.paper:.2f}", f"{found.exponent:.2f}", verdict)
        out.add_row(*head, sweep.over, sizes, sweep.complexity, *figures)
    return out


def sweep_notes(sweeps: Sequence[Sweep]) -> list[str]:
    """Why exponents differ, and which points were left out."""
    lines = []
    for sweep in sweeps:
        where = f"{sweep.operator} {sweep.variant} over {sweep.over}, {sweep.direction}"
        busy = [str(point.size) for point in sweep.points if point.busy]
        if sweep.fit is not None and sweep.fit.reason:
            lines.append(f"{where}: {sweep.fit.reason}")
        if busy:
            lines.append(f"{where}: machine busy at {', '.join(busy)}, left out of the fit")
    return lines


def throughput_table(rates: Sequence[Rate]) -> Table:
    """Images a second by model, in the order of CrossViT's Table 4, each batch in its columns."""
    from rich.table import Table

    out = Table(title="Throughput of inference (images/s), ours against the official formulation")
    out.add_column("model", no_wrap=True)
    for title in ("image", "M params", "GMACs"):
        out.add_column(title, justify="right", no_wrap=True)
    batches = sorted({rate.batch for rate in rates})
    for batch in batches:
        for title in (f"B={batch}", "plain", "x"):
            out.add_column(title, justify="right", no_wrap=True)
    out.add_column("paper, V100, B=64", justify="right")
    lines: dict[str, dict[int, Rate]] = {}
    for rate in rates:
        lines.setdefault(rate.model, {})[rate.batch] = rate
    for model, by_batch in lines.items():
        one = next(iter(by_batch.values()))
        cells = [f"{one.side}", f"{one.params / 1e6:.1f}", f"{one.macs / 1e9:.1f}"]
        for batch in batches:
            cells += _rate_cells(by_batch.get(batch))
        out.add_row(model, *cells, "-" if one.printed is None else str(one.printed))
    return out


def _rate_cells(rate: Rate | None) -> list[str]:
    if rate is None:
        return ["-", "-", "-"]
    ratio = "[yellow]busy" if rate.ratio is None else f"{rate.ratio:.2f}"
    return [f"{rate.images:.1f}", f"{rate.plain_images:.1f}", ratio]


def compare_table(changes: Sequence[Change]) -> Table:
    """Each case then and now."""
    from rich.table import Table

    out = Table(title="Against the earlier run (above 1 it is faster now)")
    out.add_column("case", no_wrap=True)
    for title in ("then, ms", "now, ms", "x", ""):
        out.add_column(title, justify="right")
    colours = {"faster": "green", "slower": "red"}
    for change in changes:
        times = (f"{change.before * 1e3:.3f}", f"{change.now * 1e3:.3f}")
        factor = f"{change.factor:.2f}" if " " not in change.verdict else "-"
        style = colours.get(change.verdict)
        out.add_row(change.case, *times, factor, change.verdict, style=style)
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
        where = f"{row.label} {_short(row.dtype)} {row.direction}"
        if row.refused:
            lines[f"{where}: no ratio ({row.refused})"] = None
        for name, why in row.skipped.items():
            if why != "left out":
                lines[f"{where}: {name} did not run ({why})"] = None
    return list(lines)


def _share(row: Row) -> str:
    if row.roofline_share is None or row.best_ratio is None:
        return "-"  # the machine was too busy to measure the roofline, or the row
    return f"{row.roofline_share:.0%}"


def _short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "f")


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f}"
