"""The results as pictures: bars, latency against MACs, roofline, scaling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_ops.benchmarks.runner import STEP_FLOPS, WARM, Row
from xattn_ops.benchmarks.sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
}
MARKERS = "osD^vP*X<>hp"


def save(figure: Figure, path: Path) -> None:
    """As PNG, SVG or PDF, after the ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def bars(rows: Sequence[Row], title: str) -> Figure:
    """How long each takes in units of ours: a panel for each operator, dtype and direction."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.timing is not None:
            key = (row.operator, row.dtype, row.direction) + (row.cache,) * (row.cache != WARM)
            panels.setdefault(key, []).append(row)
    if not panels:
        raise ValueError("nothing was timed, so there is nothing to plot")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len({row.shape for row in members}) for members in panels.values())
    width = max(4.6, 1.15 * most)  # a shape's label needs an inch
    figure = Figure(figsize=(width * columns, 3.2 * lines), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (key, members) in zip(axes, panels.items(), strict=False):
        _bars(axis, members)
        axis.set_title(", ".join(key), fontsize=10)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def latency(rows: Sequence[Row], title: str) -> Figure:
    """Milliseconds against MACs of the whole batch, ours filled, the best plain one hollow."""
    figure, axis = _axis(title)
    for operator, (marker, colour, members) in _groups(rows).items():
        for row in members:
            assert row.timing is not None
            work = row.macs * (1 if row.direction == "fwd" else STEP_FLOPS) / 1e6
            axis.plot(
                work, row.timing.median * 1e3, marker, color=colour, markersize=5, label=operator
            )
            if row.baselines:
                plain = min(timing.median for timing in row.baselines.values())
                axis.plot(
                    work, plain * 1e3, marker, color=colour, markersize=5, markerfacecolor="none"
                )
    axis.set_xlabel("MMACs of the paper's algorithm (a training step as three forwards)")
    axis.set_ylabel("ms (hollow: best plain PyTorch)")
    _finish(axis)
    return figure


def roofline(rows: Sequence[Row], measured: dict[str, Any], title: str) -> Figure:
    """GFLOP/s against FLOP per byte, under the measured peak and bandwidths."""
    figure, axis = _axis(title)
    intensities = [row.gflops / row.gbps for row in rows if row.timing is not None and row.gbps]
    if not intensities:
        raise ValueError("nothing was timed, so there is nothing to plot")
    low, high = min(intensities) / 2, max(intensities) * 2
    copies = [float(value) for value in measured["copy_gbps_by_bytes"].values()]
    for dtype, peak in measured["gflops"].items():
        axis.axhline(peak, color="0.5", linewidth=1)
        axis.annotate(f"best linear, {dtype}", (low, peak), fontsize=8, va="bottom", color="0.5")
    top = max(measured["gflops"].values(), default=float("inf"))
    for bandwidth, name in ((max(copies, default=0), "cache"), (min(copies, default=0), "memory")):
        if bandwidth:
            ends = [low, min(high, top / bandwidth)]
            axis.plot(ends, [bandwidth * end for end in ends], color="0.5", linewidth=1)
            axis.annotate(
                f"copy, {name}", (low, low * bandwidth), fontsize=8, va="bottom", color="0.5"
            )
    for operator, (marker, colour, members) in _groups(rows).items():
        for row in members:
            axis.plot(
                row.gflops / row.gbps, row.gflops, marker, color=colour, markersize=5,
                label=operator,
            )  # fmt: skip
    axis.set_xlabel("FLOP per byte read and written")
    axis.set_ylabel("GFLOP/s")
    _finish(axis)
    return figure


def scaling(sweeps: Sequence[Sweep], over: str, title: str) -> Figure:
    """Milliseconds against tokens or images, with the fitted exponent beside the paper's."""
    figure, axis = _axis(title)
    chosen = [sweep for sweep in sweeps if sweep.over == over and sweep.points]
    operators = list(dict.fromkeys(sweep.operator for sweep in chosen))
    for sweep in chosen:
        i = operators.index(sweep.operator)
        label = f"{sweep.operator} {sweep.variant}"
        if sweep.fit is not None:
            label += f": {sweep.fit.exponent:.2f} (paper {sweep.fit.paper:.2f})"
        axis.plot(
            [point.x for point in sweep.points],
            [point.seconds * 1e3 for point in sweep.points],
            MARKERS[i % len(MARKERS)] + ("--" if sweep.variant == "eager" else "-"),
            color=f"C{i % 10}",
            markersize=4,
            alpha=0.5 if sweep.variant == "eager" else 1.0,
            label=label,
        )
    axis.set_xlabel("tokens of the image" if over == "side" else "images")
    axis.set_ylabel("ms")
    _finish(axis)
    return figure


def _axis(title: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 5.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure, figure.subplots()


def _finish(axis: Any) -> None:
    """Logarithmic axes; every label once."""
    from matplotlib.ticker import NullFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, which="major", linewidth=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axis.legend(once.values(), once.keys(), fontsize=7, frameon=False)


def _groups(rows: Sequence[Row]) -> dict[str, tuple[str, str, list[Row]]]:
    """Marker, colour and timed rows of each operator."""
    groups: dict[str, tuple[str, str, list[Row]]] = {}
    for row in rows:
        if row.timing is not None and row.macs:
            i = len(groups)
            fresh: list[Row] = []
            look = (MARKERS[i % len(MARKERS)], f"C{i % 10}", fresh)
            groups.setdefault(row.operator, look)[2].append(row)
    if not groups:
        raise ValueError("nothing was timed, so there is nothing to plot")
    return groups


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
