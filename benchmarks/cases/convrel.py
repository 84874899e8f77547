"""Conv-relative attention at the scales of CoaT: the attention itself, and the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xattn_ops import ConvRelativeAttention, conv_relative_attention, flops
from xattn_ops.benchmarks import baselines
from xattn_ops.benchmarks.cases.case import STEP, Case, Maker, Variant, on, oracle
from xattn_ops.benchmarks.cases.shapes import Grid


def convrel_case(grid: Grid, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """The attention itself: qkv, convolutions and their biases in, [B, N, C] out."""
    make, batch = Maker(dtype, direction), grid.batch(batch)
    groups = [(window, heads * grid.head_dim) for window, heads in grid.windows]
    operands = (
        make(batch, grid.tokens, 3 * grid.channels),
        *(make(channels, 1, window, window, scale=1 / window) for window, channels in groups),
        *(make(channels, scale=0.1) for _, channels in groups),
    )

    def fused(qkv: Tensor, *conv: Tensor) -> Tensor:
        options: dict[str, Any] = {
            "num_heads": grid.heads,
            "grid": grid.size,
            "num_prefix_tokens": grid.prefix,
        }
        return conv_relative_attention(qkv, conv[: len(groups)], conv[len(groups) :], **options)

    eager = baselines.convrel_eager(grid.heads, grid.size, grid.prefix)
    nhwc = baselines.convrel_nhwc(grid.heads, grid.size, grid.prefix)
    return Case(
        operator="convrel",
        shape=str(grid),
        batch=batch,
        dtype=dtype,
        direction=direction,
        ours={"fused": Variant(fused, operands, operands)},
        plain=on(operands, compile="nhwc", eager=eager, nhwc=nhwc),
        oracle=oracle(eager, operands),
        macs=batch * (_macs(grid) - 4 * grid.tokens * grid.channels**2),
        dense_bytes=_dense_bytes(grid, batch, dtype),
        tokens=grid.tokens,
    )


def convrel_module_case(grid: Grid, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """ConvRelativeAttention with its two linears."""
    make, batch = Maker(dtype, direction), grid.batch(batch)
    x = make(batch, grid.tokens, grid.channels)
    torch.manual_seed(0)
    module = ConvRelativeAttention(
        grid.channels,
        grid.heads,
        windows=dict(grid.windows),
        num_prefix_tokens=grid.prefix,
    )
    module.to(dtype).train(direction == STEP)
    operands = (x, *baselines.linears_of(module), *baselines.convolutions_of(module))

    def fused(x: Tensor) -> Tensor:
        return module(x, grid.size)

    eager = baselines.with_linears(baselines.convrel_eager(grid.heads, grid.size, grid.prefix))
    nhwc = baselines.with_linears(baselines.convrel_nhwc(grid.heads, grid.size, grid.prefix))
    return Case(
        operator="convrel_module",
        shape=str(grid),
        batch=batch,
        dtype=dtype,
        direction=direction,
        ours={"fused": Variant(fused, (x,), operands)},
        plain=on(operands, compile="nhwc", eager=eager, nhwc=nhwc),
        oracle=oracle(eager, operands),
        macs=batch * _macs(grid),
        dense_bytes=_dense_bytes(grid, batch, dtype),
        tokens=grid.tokens,
    )


def _macs(grid: Grid) -> int:
    """Of the module on one image."""
    windows = dict(grid.windows)
    return flops.conv_relative(
        grid.height, grid.width, grid.channels, grid.heads, windows, grid.prefix
    )


def _dense_bytes(grid: Grid, batch: int, dtype: torch.dtype) -> int:
    return batch * grid.heads * grid.tokens**2 * dtype.itemsize
