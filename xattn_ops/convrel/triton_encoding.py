"""The conv position encoding in Triton, and its gradients.

Forward and backward are one kernel: the tokens plus their convolution, or grad_out plus its
transposed convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tiles, _triton
from .._registration import register_triton
from .triton_convolution import (
    Section,
    Taps,
    alignment,
    band_arguments,
    band_of,
    convolve,
    in_runs,
    launch,
    load_bias,
    section,
    spread,
    store_band,
    tokens_of,
    weight_gradients,
)


@triton.jit
def _add_convolution(
    x, taps, out, stride_b, stride_n, N, prefix, H, W, runs, per_run, bands,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr,
    SECTIONS: tl.constexpr, N_SECTIONS: tl.constexpr, BT: tl.constexpr, LARGEST: tl.constexpr,
    WIDTH: tl.constexpr, FLIP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [B, N, C] of a run of tokens; FLIP: of the transposed convolution, without the bias.
    Grid: bands x runs x B."""
    band, run = tl.program_id(0) % bands, tl.program_id(0) // bands % runs
    image = (tl.program_id(0) // (bands * runs)).to(tl.int64)
    start, end, low, high, window = band_of(band, D, ALIGN, SECTIONS, N_SECTIONS)
    c = start + tl.arange(0, BC)
    x += image * stride_b * UNIT
    out += image * N * C
    for step in range(per_run):
        n = tokens_of(run * per_run + step, BT, WIDE)
        mask = (n < N)[:, None] & (c < end)[None, :]
        token = tl.load(x + n[:, None] * (stride_n * UNIT) + c[None, :], mask=mask, other=0.0)
        near = convolve(
            x, stride_n * UNIT, x, stride_n, taps, n, prefix, H, W, c, end, window,
            LARGEST, WIDTH, FLIP, False,
        )  # fmt: skip
        if not FLIP:
            near += load_bias(taps, c, end, LARGEST, WIDTH)
        sum = token.to(tl.float32) + tl.where((n >= prefix)[:, None], near, 0.0)
        to = out + n[:, None] * C + c[None, :]
        store_band(to, sum, n < N, c, low, high, ALIGN, False)


def _plan(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int,
) -> tuple[_tiles.Problem, dict[str, Any], Section, Taps]:
    """What the table of tiles knows of a call, the sizes, the bands of channels, and the weights as
    kernels read them; other: a second tensor of tokens."""
    B, N, C = x.shape
    strides = x.stride()[:2] + (() if other is None else other.stride()[:2])
    sizes = alignment(C, *strides)
    names = ("stride_b", "stride_n", "grad_stride_b", "grad_stride_n")
    arguments: dict[str, Any] = {
        **{name: s // sizes["UNIT"] for name, s in zip(names, strides, strict=False)},
        **{"B": B, "N": N, "prefix": num_prefix_tokens, "H": grid[0], "W": grid[1], "C": C},
        **sizes,
        "WIDE": N * max(C, *strides[1::2]) >= 2**31,
    }
    vector, window = sizes["ALIGN"], weight.shape[-1]
    problem = _tiles.Problem("convpos", C, N, x.dtype)
    edge = _triton.shape(problem, "add_convolution", x.device).edge
    bands = section(0, C // vector, window, vector, vector, edge)  # of any whole vectors
    return problem, arguments, bands, spread(problem, weight.contiguous(), bias, [window], [C])


def _launch(
    x: Tensor,
    problem: _tiles.Problem,
    sizes: dict[str, Any],
    bands: Section,
    taps: Taps,
    flip: bool,
) -> Tensor:
    """x plus its convolution."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    arguments = taps.arguments | sizes | band_arguments([bands])
    runs = in_runs(arguments)
    given = {"x": x, "taps": taps.tensor, "out": out, "FLIP": flip}
    launch(_add_convolution, runs["programs"], problem, arguments, runs, given)
    return out


def convpos_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid_h: int,
    grid_w: int,
    num_prefix_tokens: int,
) -> Tensor:
    """out [B, N, C]; the arguments are those of the native op of this name."""
    if not x.numel():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    x = _triton.dense(x)
    planned = _plan(x, None, weight, bias, (grid_h, grid_w), num_prefix_tokens)
    return _launch(x, *planned, flip=False)


def convpos_bwd(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid_h: int,
    grid_w: int,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty where it is None)."""
    if not x.numel():
        grad_bias = weight.new_zeros(0 if bias is None else bias.shape)
        return torch.empty_like(x), torch.zeros_like(weight), grad_bias
    grad_out, x = _triton.dense(grad_out), _triton.dense(x)
    grid = (grid_h, grid_w)
    problem, sizes, bands, taps = _plan(x, grad_out, weight, bias, grid, num_prefix_tokens)
    strides = {"stride_b": sizes["grad_stride_b"], "stride_n": sizes["grad_stride_n"]}
    grad_x = _launch(grad_out, problem, sizes | strides, bands, taps, flip=True)
    common = sizes | {"grad": grad_out, "factors": x, "values": x, "FACTORS": False}
    return grad_x, *weight_gradients(problem, taps, [bands], common, weight, bias)


register_triton("convpos_fwd", convpos_fwd)
register_triton("convpos_bwd", convpos_bwd)
