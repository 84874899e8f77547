"""The command line: ``python -m xattn_ops info | demo | flops | bench | report | kernels``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xattn_ops._version import __version__
from xattn_ops.benchmarks.options import add_arguments as add_bench_arguments
from xattn_ops.kernel_report import CARDS
from xattn_ops.kernel_report import DTYPES as KERNEL_DTYPES

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 132
TOOLS = "rich and matplotlib: pip install 'xattn_ops[tools]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a check failed, 2 a wrong argument."""
    args = parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("rich", "matplotlib", "PIL"):
            raise
        return _fail(f"this command needs {TOOLS}")
    except (OSError, ValueError, RuntimeError) as error:
        return _fail(str(error))
    return status


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="xattn_ops", description="Fused vision attention operators.")
    top.add_argument("--version", action="version", version=f"xattn_ops {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="versions, backends, what is missing and how to get it")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="a photo through a model: accuracy, speed, pictures")
    demo.add_argument("image", nargs="?", type=Path, metavar="IMAGE", help="a photo (a sample)")
    demo.add_argument("--model", default="cat_tiny", help="of any family (cat_tiny)")
    demo.add_argument("--weights", type=Path, metavar="FILE", help="official checkpoint (random)")
    demo.add_argument("--block", type=int, metavar="N", help="whose CLS or digest map to draw")
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="pictures")
    demo.add_argument("--size", type=int, default=224, help="side of the square crop in pixels")
    demo.add_argument("--batch", type=int, default=8, help="copies of the photo when timing")
    demo.add_argument("--seconds", type=float, default=1.0, help="of timing, an operator and stage")
    demo.add_argument("--threads", type=int, help="intra-op threads (torch's own choice)")
    demo.set_defaults(run=_demo)

    flops = commands.add_parser("flops", help="parameters and MACs beside the papers' figures")
    flops.add_argument(
        "models", nargs="*", metavar="MODEL", help="their rows, and MACs by module (all rows)"
    )
    flops.add_argument("--depth", type=int, default=1, help="of the modules of a MODEL (1)")
    flops.add_argument("--json", type=Path, metavar="FILE", help="write everything counted")
    flops.set_defaults(run=_flops)

    bench = commands.add_parser("bench", help="the operators against plain PyTorch")
    add_bench_arguments(bench)
    bench.set_defaults(run=_bench)

    kernels = commands.add_parser("kernels", help="what compilers make of the GPU kernels")
    kernels.add_argument("operators", nargs="*", metavar="OPERATOR", help="ipsa (all)")
    arch = "Triton: those that its table of launches tells apart; CUDA: all that were built"
    kernels.add_argument("--arch", nargs="+", choices=list(CARDS), help=arch)
    kernels.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=list(KERNEL_DTYPES))
    backends = ("triton", "cuda")
    kernels.add_argument("--backend", nargs="+", default=backends, choices=backends)
    kernels.add_argument("--json", action="store_true", help="JSON in place of a table")
    sweep = "Triton: half and twice the warps too, a stage of loads more or less"
    kernels.add_argument("--sweep", action="store_true", help=sweep)
    paper = "Triton: at the papers' shapes alone"
    kernels.add_argument("--paper", action="store_true", help=paper)
    kernels.set_defaults(run=_kernels)

    report = commands.add_parser("report", help="papers and measurements on one HTML page")
    report.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE")
    report.add_argument(
        "--results",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="files of `bench --json`, or folders of them (those of benchmarks/results)",
    )
    report.set_defaults(run=_report)
    return top


def _info(_: argparse.Namespace) -> int:
    from xattn_ops.info import describe

    print(describe())
    return 0


def _demo(args: argparse.Namespace) -> int:
    from xattn_ops.demo import run

    return run(args, _console())


def _flops(args: argparse.Namespace) -> int:
    from xattn_ops.papers.command import main as flops

    return flops(args, _console())


def _bench(args: argparse.Namespace) -> int:
    from xattn_ops.benchmarks.command import main as bench

    return bench(args, _console())


def _report(args: argparse.Namespace) -> int:
    from xattn_ops.report.command import main as report

    return report(args, _console())


def _kernels(args: argparse.Namespace) -> int:
    from xattn_ops.kernel_report.command import command

    what = (args.operators, args.arch, args.dtype, args.backend)
    return command(*what, args.json, args.sweep, args.paper, _console())


def _console() -> Console:
    """A console wide enough for the tables where the output is a file or a pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _fail(message: str) -> int:
    print(f"xattn_ops: {message}", file=sys.stderr)
    return 2
