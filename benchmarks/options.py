"""The options of ``python -m xattn_ops bench``; what they do is in `command`."""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("fwd", "fwdbwd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser everything that `command.main` reads."""
    add = parser.add_argument
    add(
        "operators",
        nargs="*",
        metavar="OPERATOR",
        help="ipsa, cpsa, convrel, convpos, digest, clsattn (all)",
    )
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], metavar="DTYPE")
    add("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    add("--stages", nargs="+", type=int, metavar="N", help="of an operator's shapes, from 0 (all)")
    add("--batch", type=int, default=8)
    add("--blocks", action="store_true", help="whole blocks of CAT, CoaT and CabViT too")
    add("--models", nargs="*", metavar="NAME", help="whole models too (the operators')")
    add("--timm", nargs="*", metavar="NAME", help="timm's models before and after patch (three)")
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
    add("--no-memory", action="store_true", help="leave out the peak memory of a training step")
    add(
        "--quick",
        action="store_true",
        help="a look in seconds: short timing, no compiled baselines, no memory",
    )
