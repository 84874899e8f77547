"""The options of ``python -m xattn_ops bench``; what they do is in `command`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("fwd", "fwdbwd")
DEVICES = ("cpu", "cuda")
CACHES = ("warm", "cold")
PRESETS: dict[str, dict[str, Any]] = {  # for every option that is not given
    "paper": {
        "cases": True,
        "blocks": True,
        "models": [],
        "cache": list(CACHES),
        "sweep": ["side", "batch"],
        "throughput": [],
    },
    "quick": {"quick": True},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser everything that `command.main` reads."""
    add = parser.add_argument
    add(
        "operators",
        nargs="*",
        metavar="OPERATOR",
        help="ipsa, cpsa, convrel, convpos, digest, merge, clsattn, ... (all)",
    )
    add("--preset", choices=PRESETS, help="paper: everything that the papers speak of; quick")
    add("--device", choices=DEVICES, default="cpu", help="where the operands lie (cpu)")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], metavar="DTYPE")
    add("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    add("--stages", nargs="+", type=int, metavar="N", help="of an operator's shapes, from 0 (all)")
    add("--batch", type=int, default=8)
    add(
        "--cases",
        action=argparse.BooleanOptionalAction,
        help="the operators at the models' shapes (unless a sweep or throughput is asked for)",
    )
    add("--blocks", action="store_true", help="whole blocks too")
    add("--models", nargs="*", metavar="NAME", help="whole models too (the operators')")
    add("--timm", nargs="*", metavar="NAME", help="timm's models before and after patch (three)")
    add(
        "--sweep",
        nargs="+",
        choices=("side", "batch"),
        default=[],
        help="how time grows from side 112 to 896 or batch 1 to 64, with fitted exponents",
    )
    add("--sizes", nargs="+", type=int, metavar="N", help="other sides or batches to sweep")
    add(
        "--throughput",
        nargs="*",
        metavar="MODEL",
        help="images/s of models at batch 1 and --batch (the papers' models)",
    )
    add("--cache", nargs="+", choices=CACHES, default=["warm"], help="warm, cold or both (warm)")
    add("--threads", type=int, help="intra-op threads (torch's own choice)")
    add("--budget", type=float, help="seconds of timing a case (2; 0.2 with --quick)")
    add(
        "--heap",
        choices=("default", "steady"),
        default="default",
        help="steady: malloc keeps freed memory, which spares formulations with large "
        "intermediates the page faults that they have by default",
    )
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--markdown", type=Path, metavar="FILE", help="write the ratios as a table for a README")
    add("--plot", type=Path, metavar="FILE", help="write bars as PNG, SVG or PDF")
    add("--plots", type=Path, metavar="DIR", help="write latency, roofline and scaling as PNG")
    add("--compare", type=Path, metavar="OLD.json", help="set the run against an earlier one's")
    add("--no-memory", action="store_true", help="leave out the peak memory of a training step")
    add(
        "--quick",
        action="store_true",
        help="a look in seconds: short timing, no compiled baselines, no memory",
    )


def with_preset(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, those of the preset in place of what was not given."""
    if args.preset is None:
        return args
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    chosen = {k: v for k, v in PRESETS[args.preset].items() if getattr(args, k) == defaults[k]}
    return argparse.Namespace(**{**vars(args), **chosen})
