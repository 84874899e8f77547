"""``python -m xattn_ops report``: the page of papers and measurements."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from xattn_ops import benchmarks
from xattn_ops.benchmarks import compare
from xattn_ops.papers import operators
from xattn_ops.papers.command import judged_lines
from xattn_ops.report.page import Run, page

RESULTS = Path(benchmarks.__file__).parent / "results"


def main(args: argparse.Namespace, console: Console) -> int:
    """Write the page.

    Raises:
        ValueError: a file that holds no results, or a folder that is not there.
    """
    runs = [Run.from_dict(path.stem, compare.load(path)) for path in _files(args.results)]
    counted = [operators.count(form) for form in operators.FORMS]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(judged_lines(), counted, runs), encoding="utf-8")
    size = args.out.stat().st_size / 1024
    console.print(f"wrote {args.out} ({size:.0f} KiB, {len(runs)} files of results)")
    return 0


def _files(given: list[Path] | None) -> list[Path]:
    """The files, and those of the folders, newest name first."""
    if given is None:
        given = [RESULTS] if RESULTS.is_dir() else []
    files: list[Path] = []
    for path in given:
        if not path.exists():
            raise ValueError(f"no results at {path}")
        found = sorted(path.glob("*.json"), reverse=True) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"no results in {path}: it has no *.json")
        files += found
    return files
