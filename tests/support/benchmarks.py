"""Small cases of the benchmark."""

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import torch

from xattn_ops.benchmarks import cases, runner
from xattn_ops.benchmarks.cases import FORWARD, Case, Grid, Merge, Stage, Tokens, WithDigests
from xattn_ops.benchmarks.roofline import Roofline
from xattn_ops.benchmarks.timing import Timing

QUICK = runner.Settings(budget=0.01, min_rounds=3, compile=False, max_spread=1e9, max_waited=1e9)
ROOF = Mock(spec=Roofline, **{"least_seconds.return_value": 1e-9})

TINY = Stage(6, 9, 8, 2, window=(3, 3))
TINY_GRID = Grid(5, 6, 4, heads=3, prefix=2, windows=((3, 1), (5, 2)))
TINY_DIGESTS = WithDigests(5, 6, 4, heads=3, earlier=2)
TINY_TOKENS = Tokens(11, 12, 3)
TINY_MERGE = Merge(5, 6, 7, window=5, stride=2)
SHAPES = (TINY, TINY_GRID, TINY_TOKENS, TINY_DIGESTS, TINY_MERGE)


def tiny(operator: str, direction: str = FORWARD, dtype: torch.dtype = torch.float32) -> Case:
    """Two images of a small shape of the operator's kind."""
    shape = next(tiny for tiny in SHAPES if type(tiny) is type(cases.SHAPES[operator][0]))
    return cases.BUILDERS[operator](shape, 2, dtype, direction)


def calm(seconds: float, **changes: Any) -> Timing:
    """A measurement on a quiet machine."""
    return replace(Timing(seconds, seconds, 0.01 * seconds, 9, 1, 1), **changes)
