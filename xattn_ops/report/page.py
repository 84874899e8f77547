"""The page: sections in order, with style and script inside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from xattn_ops._version import __version__
from xattn_ops.benchmarks import plots
from xattn_ops.benchmarks.memory import Peak
from xattn_ops.benchmarks.runner import Row
from xattn_ops.benchmarks.sweep import OVER, Sweep
from xattn_ops.benchmarks.throughput import Rate
from xattn_ops.papers import PAPERS
from xattn_ops.papers.command import CONVENTIONS, Line, summary
from xattn_ops.papers.operators import Counted
from xattn_ops.report import sections
from xattn_ops.report.html import figure, folded, paragraph, section, table
from xattn_ops.report.pictures import style, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Run:
    """One file of results."""

    name: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    roofline: dict[str, Any]
    rows: list[Row]
    peaks: list[Peak]
    sweeps: list[Sweep]
    rates: list[Rate]

    @classmethod
    def from_dict(cls, name: str, data: dict[str, Any]) -> Run:
        return cls(
            name=name,
            machine=data["machine"],
            settings=data["settings"],
            roofline=data["roofline"],
            rows=[Row.from_dict(row) for row in data["rows"]],
            peaks=[Peak(**{"tokens": 0, **peak}) for peak in data["memory"]],
            sweeps=[Sweep.from_dict(one) for one in data.get("sweeps", ())],
            rates=[Rate.from_dict(one) for one in data.get("throughput", ())],
        )

    @property
    def where(self) -> str:
        """Machine, versions and commit in a line."""
        machine = self.machine
        words = [
            machine.get("accelerator") or machine["cpu"],
            f"{machine['threads']} threads",
            machine["isa"],
            f"torch {machine['versions']['torch']}",
            f"xattn_ops {machine['versions']['xattn_ops']}",
            f"commit {machine['commit'] or 'unknown'}",
        ]
        return ", ".join(words)


def page(lines: Sequence[Line], counted: Sequence[Counted], runs: Sequence[Run]) -> str:
    """The whole page as one HTML document without a single reference to the outside."""
    parts = [
        ("papers", "What the papers print", _papers(lines)),
        ("operators", "What the operators cost", [table(sections.operators(counted))]),
    ]
    parts += [
        (f"run-{i}", f"Measured: {run.name}", _run(run, f"run-{i}")) for i, run in enumerate(runs)
    ]
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in parts)
    body = "".join(section(name, title, *content) for name, title, content in parts)
    title = "xattn_ops: papers and measurements"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_file('style.css')}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{title}</h1>\n{paragraph(_lead(lines, runs))}</header>\n"
        f"<nav>\n<ul>{links}</ul>\n</nav>\n<main>\n{body}</main>\n"
        f"<script>\n{_file('sort.js')}</script>\n</body>\n</html>\n"
    )


def _lead(lines: Sequence[Line], runs: Sequence[Run]) -> str:
    files = f"{len(runs)} files of measurements" if len(runs) != 1 else "one file of measurements"
    return f"Version {__version__}. {summary(lines)}. Below: {files}."


def _papers(lines: Sequence[Line]) -> list[str]:
    by_paper = [(paper, [one for one in lines if one.paper is paper]) for paper in PAPERS]
    tables = [table(sections.paper(paper, of_it)) for paper, of_it in by_paper if of_it]
    return [*tables, *(paragraph(words) for words in CONVENTIONS)]


def _run(run: Run, name: str) -> list[str]:
    """Everything of one file, its longest tables folded."""
    parts = [paragraph(run.where)]
    if run.rates:
        parts.append(table(sections.throughput(run.rates)))
    if run.sweeps:
        parts.append(table(sections.sweeps(run.sweeps)))
        parts += [
            _drawn(
                f"{name}-{over}",
                functools.partial(plots.scaling, run.sweeps, over, ""),
                f"Time over {'tokens of the image' if over == 'side' else 'images'}; "
                "dashed: eager PyTorch",
            )
            for over in OVER
            if any(one.over == over for one in run.sweeps)
        ]
    if any(row.timing for row in run.rows):
        parts.append(
            _drawn(
                f"{name}-latency",
                lambda: plots.latency(run.rows, ""),
                "Time against MACs; hollow: the best plain PyTorch",
            )
        )
        parts.append(
            _drawn(
                f"{name}-roofline",
                lambda: plots.roofline(run.rows, run.roofline, ""),
                "Rate against intensity, under the best linear and the copies measured there",
            )
        )
    if run.rows:
        caption = "Ours against the best plain formulation"
        parts.append(folded(f"{len(run.rows)} cases", table(sections.cases(run.rows, caption))))
    if run.peaks:
        parts.append(folded("Memory", table(sections.memory(run.peaks))))
    return parts


def _drawn(name: str, draw: Callable[[], Figure], caption: str) -> str:
    from matplotlib import rc_context

    with rc_context(style(name)):
        return figure(svg(draw(), caption), caption)


def _file(name: str) -> str:
    return (resources.files("xattn_ops.report") / name).read_text(encoding="utf-8")
