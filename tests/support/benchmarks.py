"""Small cases of the benchmark."""

import torch

from xattn_ops.benchmarks import cases
from xattn_ops.benchmarks.cases import FORWARD, Case, Grid, Stage, Tokens, WithDigests

TINY = Stage(6, 9, 8, 2, window=(3, 3))
TINY_GRID = Grid(5, 6, 4, heads=3, prefix=2, windows=((3, 1), (5, 2)))
TINY_TOKENS = Tokens(11, 12, 3)
TINY_DIGESTS = WithDigests(5, 6, 4, heads=3, earlier=2)
SHAPES = (TINY, TINY_GRID, TINY_TOKENS, TINY_DIGESTS)


def tiny(operator: str, direction: str = FORWARD, dtype: torch.dtype = torch.float32) -> Case:
    """Two images of a small shape of the operator's kind."""
    shape = next(tiny for tiny in SHAPES if type(tiny) is type(cases.SHAPES[operator][0]))
    return cases.BUILDERS[operator](shape, 2, dtype, direction)
