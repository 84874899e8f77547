"""CoaT's conv position encoding at the scales of the models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xattn_ops import conv_position_encoding
from xattn_ops.benchmarks import baselines
from xattn_ops.benchmarks.cases.case import Case, Maker, Variant, on, oracle
from xattn_ops.benchmarks.cases.shapes import Grid

WINDOW = 3


def convpos_case(grid: Grid, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """Image tokens plus their depthwise convolution."""
    make, batch = Maker(dtype, direction), grid.batch(batch)
    operands = (
        make(batch, grid.tokens, grid.channels),
        make(grid.channels, 1, WINDOW, WINDOW, scale=1 / WINDOW),
        make(grid.channels, scale=0.1),
    )

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options: dict[str, Any] = {"grid": grid.size, "num_prefix_tokens": grid.prefix}
        return conv_position_encoding(x, weight, bias, **options)

    eager = baselines.convpos_eager(grid.size, grid.prefix)
    nhwc = baselines.convpos_nhwc(grid.size, grid.prefix)
    return Case(
        operator="convpos",
        shape=str(grid),
        batch=batch,
        dtype=dtype,
        direction=direction,
        ours={"fused": Variant(fused, operands, operands)},
        plain=on(operands, compile="nhwc", eager=eager, nhwc=nhwc),
        oracle=oracle(eager, operands),
        macs=batch * grid.height * grid.width * grid.channels * WINDOW**2,
        dense_bytes=0,
        tokens=grid.tokens,
    )
