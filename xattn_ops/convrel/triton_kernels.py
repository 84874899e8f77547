"""Conv-relative attention in Triton.

Two passes over the tokens. The first sums softmax(K)^T V, a D x D matrix of each head, by an online
softmax over runs of tokens; where few images leave a card idle these are shared out and combined in
a fixed order. The second forms Q (softmax(K)^T V) + Q * (conv(V) + bias), tile by tile.

Products are of bands of channels, several heads at once; what heads do not share is masked. Zeros
do not stop what is not finite: in a query or a gradient it spoils its token in the whole band.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tiles, _triton
from .._registration import register_triton
from .._triton import LOG2E, dot
from .triton_convolution import (
    PROGRAMS,
    Section,
    alignment,
    band_arguments,
    band_of,
    convolve,
    in_runs,
    launch,
    load_bias,
    section,
    sections,
    spread,
    store_band,
    tokens_of,
)

STATE_ROWS = 64  # of the state, that a program combines


@triton.jit
def load_rows(pointer, stride, n, inside, c, end, other=0.0):
    """Rows [n, c] of q, k, v or their gradients."""
    mask = inside[:, None] & (c < end)[None, :]
    return tl.load(pointer + n[:, None] * stride + c[None, :], mask=mask, other=other)


@triton.jit
def places(i, j, low, high, D: tl.constexpr, ROW: tl.constexpr):
    """Where [channels i, channels j] of matrices of each head stand, in rows of ROW values, and
    which of them are: both channels of one head of those in [low, high)."""
    together = (i // D)[:, None] == (j // D)[None, :]
    together &= ((i >= low) & (i < high))[:, None] & ((j >= low) & (j < high))[None, :]
    return i[:, None] * ROW + (j % D)[None, :], together


@triton.jit
def load_matrix(pointer, i, j, low, high, D: tl.constexpr, ROW: tl.constexpr):
    """The matrices of a band as one, zero between channels of different heads."""
    at, together = places(i, j, low, high, D, ROW)
    return tl.load(pointer + at, mask=together, other=0.0)


@triton.jit
def _forward_context(
    qkv, state, stride_b, stride_n, B, N, parts, per_part, bands,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr,
    ALIGN: tl.constexpr, UNIT: tl.constexpr, SECTIONS: tl.constexpr, N_SECTIONS: tl.constexpr,
    BT: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """state [B, C, D + 2]: of each channel of k its row of softmax(K)^T V, its maximum and the
    inverse of its sum; without WHOLE [parts, B, C, D + 2] of runs of tokens: e^(k - maximum)^T V,
    maximum and sum. Grid: tiles of v x tiles of k x bands x parts x B."""
    tile_v, tile_k = tl.program_id(0) % TILES, tl.program_id(0) // TILES % TILES
    unit = tl.program_id(0) // (TILES * TILES)
    band, part = unit % bands, unit // bands % parts
    image = (unit // (bands * parts)).to(tl.int64)
    start, end, low, high, _ = band_of(band, D, ALIGN, SECTIONS, N_SECTIONS)
    i = start + tile_k * BC + tl.arange(0, BC)
    j = start + tile_v * BC + tl.arange(0, BC)
    qkv += image * stride_b * UNIT
    stride_n = stride_n * UNIT
    highest = tl.full((BC,), float("-inf"), tl.float32)
    total = tl.zeros((BC,), tl.float32)
    context = tl.zeros((BC, BC), tl.float32)
    for step in range(per_part):
        n = tokens_of(part * per_part + step, BT, WIDE)
        k = load_rows(qkv + C, stride_n, n, n < N, i, end, float("-inf")).to(tl.float32)
        v = load_rows(qkv + 2 * C, stride_n, n, n < N, j, end)
        above = tl.maximum(highest, tl.max(k, 0))
        level = tl.where(above == float("-inf"), 0.0, above)  # nothing but -inf so far
        e = tl.exp2((k - level[None, :]) * LOG2E)
        before = tl.exp2((highest - level) * LOG2E)
        total = total * before + tl.sum(e, 0)
        context = context * before[:, None] + dot(tl.trans(e.to(v.dtype)), v, PRECISION)
        highest = above
    own = (i >= low) & (i < high)
    if WHOLE:
        total = 1 / tl.where(own, total, 1.0)
        context *= total[:, None]
    state += (part * B + image) * C * (D + 2)
    at, together = places(i, j, low, high, D, D + 2)
    tl.store(state + at, context, mask=together)
    own &= tile_v == 0
    tl.store(state + i * (D + 2) + D, highest, mask=own)
    tl.store(state + i * (D + 2) + D + 1, total, mask=own)


@triton.jit
def _combine(
    shares, state, rows, parts, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """state [rows, D + 2] from shares [parts, rows, D + 2], in their order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BD)
    inside = row < rows
    mask = inside[:, None] & (d < D)[None, :]
    at = row.to(tl.int64) * (D + 2)
    share = at
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    context = tl.zeros((BLOCK, BD), tl.float32)
    for _ in range(parts):
        top = tl.load(shares + share + D, mask=inside, other=0.0)
        above = tl.maximum(highest, top)
        level = tl.where(above == float("-inf"), 0.0, above)
        before, now = tl.exp2((highest - level) * LOG2E), tl.exp2((top - level) * LOG2E)
        total = total * before + tl.load(shares + share + D + 1, mask=inside, other=1.0) * now
        part = tl.load(shares + share[:, None] + d[None, :], mask=mask, other=0.0)
        context = context * before[:, None] + part * now[:, None]
        highest = above
        share += rows * (D + 2)
    total = 1 / total
    tl.store(state + at[:, None] + d[None, :], context * total[:, None], mask=mask)
    tl.store(state + at + D, highest, mask=inside)
    tl.store(state + at + D + 1, total, mask=inside)


@triton.jit
def _forward(
    qkv, taps, state, out, stride_b, stride_n, N, prefix, H, W, runs, per_run, bands, scale,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr,
    ALIGN: tl.constexpr, UNIT: tl.constexpr, SECTIONS: tl.constexpr, N_SECTIONS: tl.constexpr,
    EDGES: tl.constexpr, BT: tl.constexpr, HAS_TAPS: tl.constexpr, LARGEST: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [B, N, C] of a run of tokens; grid: tiles of channels x bands x runs x B."""
    tile = tl.program_id(0) % TILES
    unit = tl.program_id(0) // TILES
    band, run = unit % bands, unit // bands % runs
    image = (unit // (bands * runs)).to(tl.int64)
    start, end, low, high, window = band_of(band, D, ALIGN, SECTIONS, N_SECTIONS)
    c = start + tile * BC + tl.arange(0, BC)
    qkv += image * stride_b * UNIT
    out += image * N * C
    state += image * C * (D + 2)
    stride_n = stride_n * UNIT
    if TILES == 1:
        context = load_matrix(state, c, c, low, high, D, D + 2).to(qkv.dtype.element_ty)
    for step in range(per_run):
        n = tokens_of(run * per_run + step, BT, WIDE)
        q = load_rows(qkv, stride_n, n, n < N, c, end)
        if TILES == 1:
            o = dot(q, context, PRECISION)
        else:
            o = tl.zeros((BT, BC), tl.float32)
            for other in range(TILES):
                i = start + other * BC + tl.arange(0, BC)
                context = load_matrix(state, i, c, low, high, D, D + 2).to(q.dtype)
                o += dot(load_rows(qkv, stride_n, n, n < N, i, end), context, PRECISION)
        o *= scale
        if HAS_TAPS:
            relative = load_bias(taps, c, end, LARGEST, WIDTH)
            relative += convolve(
                qkv + 2 * C, stride_n, qkv, stride_n, taps, n, prefix, H, W, c, end, window,
                LARGEST, WIDTH, False, False,
            )  # fmt: skip
            o += tl.where((n >= prefix)[:, None], q.to(tl.float32) * relative, 0.0)
        store_band(out + n[:, None] * C + c[None, :], o, n < N, c, low, high, ALIGN, EDGES)


class Call(NamedTuple):
    """What the kernels of one call take, by the names of their parameters."""

    problem: _tiles.Problem
    arguments: dict[str, Any]
    heads: dict[str, Any]  # bands of all heads, whatever their convolutions
    bands: dict[str, Any]  # bands of heads of one window
    cut: list[Section]  # which these are made of

    def in_parts(self, tile: int) -> dict[str, int]:
        """How the tokens are shared out where sums run over them; by the shape alone, never by the
        card, so that sums come out the same everywhere."""
        B, N = self.arguments["B"], self.arguments["N"]
        tiles, units = -(-N // tile), B * self.heads["bands"] * self.heads["TILES"] ** 2
        parts = max(1, min(tiles // 4, PROGRAMS // units))
        per_part = -(-tiles // parts)
        parts = -(-tiles // per_part)
        return {"BT": tile, "per_part": per_part, "parts": parts, "programs": units * parts}


def plan(
    qkv: Tensor,
    grad_out: Tensor | None,
    windows: Sequence[int],
    channels: Sequence[int],
    num_heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    scale: float,
) -> Call:
    """The sizes, and how the heads are cut."""
    B, N, C3 = qkv.shape
    C, head_dim = C3 // 3, C3 // 3 // num_heads
    strides = qkv.stride()[:2] + (() if grad_out is None else grad_out.stride()[:2])
    sizes = alignment(C, *strides)
    names = ("stride_b", "stride_n", "grad_stride_b", "grad_stride_n")
    arguments: dict[str, Any] = {
        **{name: s // sizes["UNIT"] for name, s in zip(names, strides, strict=False)},
        **{"B": B, "N": N, "prefix": num_prefix_tokens, "H": grid[0], "W": grid[1]},
        **{"qkv": qkv, "scale": scale, "C": C, "PRECISION": _triton.precision(qkv.dtype)},
        **sizes,
        "EDGES": head_dim % sizes["ALIGN"] != 0,
        "WIDE": N * max(C3, *strides[1::2]) >= 2**31,
    }
    problem = _tiles.Problem("convrel", head_dim, N, qkv.dtype)
    kernel = "forward" if grad_out is None else "backward"
    fit = (sizes["ALIGN"], _triton.shape(problem, kernel, qkv.device).edge)
    heads = band_arguments([section(0, num_heads, 0, head_dim, *fit)])
    cut = sections(num_heads, head_dim, windows, channels, *fit)
    return Call(problem, arguments, heads, band_arguments(cut), cut)


def convrel_fwd(
    qkv: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    windows: Sequence[int],
    channels: Sequence[int],
    num_heads: int,
    grid_h: int,
    grid_w: int,
    num_prefix_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, N, C] and state [B, heads, D, D + 2]; the arguments and the state are those of the
    native op of this name."""
    qkv = _triton.dense(qkv)
    grid = (grid_h, grid_w)
    call = plan(qkv, None, windows, channels, num_heads, grid, num_prefix_tokens, scale)
    B, N, C3 = qkv.shape
    D = C3 // 3 // num_heads
    out = qkv.new_empty(B, N, C3 // 3)
    state = qkv.new_empty(B, num_heads, D, D + 2, dtype=torch.float32)
    if not out.numel():
        return out, state
    _launch_context(call, state)
    taps = spread(call.problem, conv_weight, conv_bias, windows, channels)
    sizes = taps.arguments | call.arguments | call.bands
    runs = in_runs(sizes)
    results = {"taps": taps.tensor, "state": state, "out": out}
    launch(_forward, runs["programs"], call.problem, sizes, runs, results)
    return out, state


def _launch_context(call: Call, state: Tensor) -> None:
    """softmax(K)^T V of every head, in parts where there are several."""
    parts = call.in_parts(64)
    count = parts["parts"]
    shares = state if count == 1 else state.new_empty(count, *state.shape)
    sizes = call.arguments | call.heads
    given = {"state": shares, "WHOLE": count == 1}
    launch(_forward_context, parts["programs"], call.problem, sizes, parts, given)
    if count > 1:
        rows, D = state.numel() // state.shape[-1], state.shape[-2]
        block = max(1, min(STATE_ROWS, 4096 // _triton.power_of_two(D)))
        given = {"shares": shares, "rows": rows, "BD": _triton.power_of_two(D), "BLOCK": block}
        launch(_combine, -(-rows // block), call.problem, sizes, parts, given, {"state": state})


register_triton("convrel_fwd", convrel_fwd)
