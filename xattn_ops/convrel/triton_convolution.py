"""Depthwise convolutions over an image's tokens in Triton, and the gradients of their weights.

What conv-relative attention and the position encoding share. A program takes a band of channels:
whole heads, read as whole vectors and so with some channels of its neighbours, which it neither
mixes nor writes. Tokens are taken in runs, whatever the image's rows: a run's neighbours are the
tokens dy * W + dx further on, and the mask says which of them are in the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tiles, _triton

PROGRAMS = 1024  # about as many as fill a large card twice
TAP_ROWS = 32  # rows of taps that a program spreads
SUM_ROWS, SHARES = 4, 16  # rows and shares that a program adds at a time


@triton.jit
def band_of(
    band, D: tl.constexpr, ALIGN: tl.constexpr, SECTIONS: tl.constexpr, N_SECTIONS: tl.constexpr
):  # fmt: skip
    """Of the heads of a band: where loads start and end, on bounds of vectors, its channels
    [low, high), and the window of their convolutions. SECTIONS holds of each section its first
    band, first head, heads of a band, last head and window."""
    first, last, window = band * 0, band * 0, band * 0
    for section in tl.static_range(N_SECTIONS):
        here = band >= SECTIONS[5 * section]
        span = SECTIONS[5 * section + 2]
        head = (band - SECTIONS[5 * section]) * span + SECTIONS[5 * section + 1]
        first = tl.where(here, head, first)
        last = tl.where(here, tl.minimum(head + span, SECTIONS[5 * section + 3]), last)
        window = tl.where(here, SECTIONS[5 * section + 4], window)
    low, high = first * D, last * D
    return low // ALIGN * ALIGN, (high + ALIGN - 1) // ALIGN * ALIGN, low, high, window


@triton.jit
def tokens_of(tile, BT: tl.constexpr, WIDE: tl.constexpr):
    """The tokens of a tile; WIDE: one image has offsets beyond 32 bits."""
    n = tile * BT + tl.arange(0, BT)
    if WIDE:
        n = n.to(tl.int64)
    return n


@triton.jit
def store_band(
    pointers, rows, inside, c, low, high, ALIGN: tl.constexpr, EDGES: tl.constexpr
):  # fmt: skip
    """rows [n, c] where low <= c < high. EDGES: bands end inside vectors; whole vectors go first,
    with one mask each, so that they are stored as such."""
    rows = rows.to(pointers.dtype.element_ty)
    if EDGES:
        vector = c // ALIGN * ALIGN
        whole = (vector >= low) & (vector + ALIGN <= high)
        tl.store(pointers, rows, mask=inside[:, None] & whole[None, :])
        ends = (c >= low) & (c < high) & ~whole
        tl.store(pointers, rows, mask=inside[:, None] & ends[None, :])
    else:
        tl.store(pointers, rows, mask=inside[:, None] & (c < high)[None, :])


@triton.jit
def convolve(
    values, stride, factors, factor_stride, taps, n, prefix, H, W, c, end, window,
    LARGEST: tl.constexpr, WIDTH: tl.constexpr, FLIP: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """[n, c]: the convolution of values, times factors if FACTORS, around the tokens n of one
    image; FLIP: transposed. Rows of tokens that are not the image's hold anything.

    The window is no constant: with its loops unrolled the compilers run out of registers.
    """
    y, x = (n - prefix) // W, (n - prefix) % W
    radius = window // 2
    first = n - radius * W - radius  # the token of the first tap
    near_row = values + first[:, None] * stride + c[None, :]
    near_factor_row = factors + first[:, None] * factor_stride + c[None, :]
    column_mask = (c < end)[None, :]
    corner = LARGEST // 2 + radius if FLIP else LARGEST // 2 - radius
    tap_row = taps + corner * (LARGEST + 1) * WIDTH + c[None, :]
    total = tl.zeros((n.shape[0], c.shape[0]), tl.float32)
    for row in range(window):
        near_y = y + row - radius
        inside = (n >= prefix) & (near_y >= 0) & (near_y < H)
        near_x = tl.where(inside, x - radius, W).to(tl.int32)  # W: out of the image, and stays so
        near, near_factor, tap = near_row, near_factor_row, tap_row
        for column in range(window):
            inside = (near_x + column).to(tl.uint32, bitcast=True) < W  # nor is it negative
            mask = inside[:, None] & column_mask
            value = tl.load(near, mask=mask, other=0.0).to(tl.float32)
            if FACTORS:
                value *= tl.load(near_factor, mask=mask, other=0.0)
            total += value * tl.load(tap, mask=column_mask, other=0.0)
            near += stride
            near_factor += factor_stride
            tap += -WIDTH if FLIP else WIDTH
        near_row += W * stride
        near_factor_row += W * factor_stride
        tap_row += -LARGEST * WIDTH if FLIP else LARGEST * WIDTH
    return total


@triton.jit
def load_bias(taps, c, end, LARGEST: tl.constexpr, WIDTH: tl.constexpr):
    """The biases of the convolutions, [1, c]."""
    return tl.load(taps + LARGEST * LARGEST * WIDTH + c, mask=c < end, other=0.0)[None, :]


@triton.jit
def _tap_of(
    row, c, C: tl.constexpr, LARGEST: tl.constexpr, GROUPS: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Where the weight of tap `row` of channel c stands in the flat weights, and whether it does:
    GROUPS holds first channel, window and place of each of COUNT groups."""
    dy, dx = row // LARGEST - LARGEST // 2, row % LARGEST - LARGEST // 2
    place = c * 0
    window = c * 0 + 1
    for group in tl.static_range(COUNT):
        here = c >= GROUPS[3 * group]
        size = GROUPS[3 * group + 1]
        window = tl.where(here, size, window)
        start = GROUPS[3 * group + 2] + (c - GROUPS[3 * group]) * (size * size)
        place = tl.where(here, start, place)
    radius = window // 2
    inside = (c < C) & (dy >= -radius) & (dy <= radius) & (dx >= -radius) & (dx <= radius)
    return place + (dy + radius) * window + dx + radius, inside & (row < LARGEST * LARGEST)


@triton.jit
def _spread_taps(
    weight, bias, taps, C: tl.constexpr, WIDTH: tl.constexpr, LARGEST: tl.constexpr,
    GROUPS: tl.constexpr, COUNT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """taps [LARGEST**2 + 1, WIDTH]: every kernel in the middle of the largest, a row for each tap
    and the last for the biases, so that programs read them along the channels."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    place, inside = _tap_of(row, c, C, LARGEST, GROUPS, COUNT)
    tap = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        of_bias = (row == LARGEST * LARGEST) & (c < C)
        tap += tl.load(bias + c + row * 0, mask=of_bias, other=0.0).to(tl.float32)
    tl.store(taps + row * WIDTH + c, tap, mask=(row <= LARGEST * LARGEST) & (c < WIDTH))


@triton.jit
def _weight_shares(
    grad, grad_stride_b, grad_stride_n, factors, values, stride_b, stride_n, shares,
    B, prefix, H, W, tiles, per_share, bands,
    D: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr,
    SECTIONS: tl.constexpr, N_SECTIONS: tl.constexpr, K: tl.constexpr, LARGEST: tl.constexpr,
    WIDTH: tl.constexpr, FACTORS: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """shares [share, LARGEST**2 + 1, WIDTH] of the gradients of the taps and biases, laid out as
    taps are; grid: rows of the kernel x bands x shares, per_share tiles of BT pixels each."""
    dy = tl.program_id(0) % K - K // 2
    band = tl.program_id(0) // K % bands
    share = tl.program_id(0) // (K * bands)
    start, end, low, high, _ = band_of(band, D, ALIGN, SECTIONS, N_SECTIONS)
    c = start + tl.arange(0, BC)
    dx = tl.arange(0, BK) - K // 2
    stride_n, grad_stride_n = stride_n * UNIT, grad_stride_n * UNIT
    total = tl.zeros((BK, BT, BC), tl.float32)
    bias = tl.zeros((BT, BC), tl.float32)
    first = share * per_share
    for step in range(min(per_share, B * tiles - first)):
        image = ((first + step) // tiles).to(tl.int64)
        pixel = tokens_of((first + step) % tiles, BT, WIDE)
        n, y, x = pixel + prefix, pixel // W, pixel % W
        mask = (pixel < H * W)[:, None] & (c < end)[None, :]
        at = image * grad_stride_b * UNIT + n[:, None] * grad_stride_n + c[None, :]
        gradient = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if FACTORS:
            at = image * stride_b * UNIT + n[:, None] * stride_n + c[None, :]
            gradient *= tl.load(factors + at, mask=mask, other=0.0)
        bias += gradient
        column = x[None, :] + dx[:, None]
        near = (column >= 0) & (column < W) & (dx <= K // 2)[:, None]
        near &= ((pixel < H * W) & (y + dy >= 0) & (y + dy < H))[None, :]
        token = (n + dy * W)[None, :] + dx[:, None]
        at = image * stride_b * UNIT + token[:, :, None] * stride_n + c[None, None, :]
        mask = near[:, :, None] & (c < end)[None, None, :]
        total += tl.load(values + at, mask=mask, other=0.0) * gradient[None, :, :]
    shares += share.to(tl.int64) * (LARGEST * LARGEST + 1) * WIDTH
    row = (LARGEST // 2 + dy) * LARGEST + LARGEST // 2 + dx
    own = (c >= low) & (c < high)
    mask = (dx <= K // 2)[:, None] & own[None, :]
    tl.store(shares + row[:, None] * WIDTH + c[None, :], tl.sum(total, 1), mask=mask)
    of_bias = shares + LARGEST * LARGEST * WIDTH + c
    tl.store(of_bias, tl.sum(bias, 0), mask=own & (dy == 0))


@triton.jit
def _sum_shares(
    shares, grad_weight, grad_bias, count, C: tl.constexpr, WIDTH: tl.constexpr,
    LARGEST: tl.constexpr, GROUPS: tl.constexpr, COUNT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHARES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The flat gradients from `count` shares, in their order; grid: rows of taps x channels."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    place, inside = _tap_of(row, c, C, LARGEST, GROUPS, COUNT)
    of_bias = (row == LARGEST * LARGEST) & (c < C)
    known = inside | of_bias
    at = shares + (row * WIDTH + c)[None, :, :]
    total = tl.zeros((SHARES, ROWS, BLOCK), tl.float32)
    for first in range(0, count, SHARES):
        share = (first + tl.arange(0, SHARES))[:, None, None]
        step = share.to(tl.int64) * ((LARGEST * LARGEST + 1) * WIDTH)
        total += tl.load(at + step, mask=(share < count) & known[None, :, :], other=0.0)
    gradient = tl.sum(total, 0)
    tl.store(grad_weight + place, gradient.to(grad_weight.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        to = grad_bias + c + row * 0
        tl.store(to, gradient.to(grad_bias.dtype.element_ty), mask=of_bias)


class Section(NamedTuple):
    """Heads [first, last) whose convolutions have at most this window, cut into bands."""

    first: int
    last: int
    head_dim: int
    window: int  # 0: no convolution
    span: int  # heads of a band
    bands: int
    columns: int  # channels that a program holds
    tiles: int  # of so many channels that a head takes, where one tile is too small


def section(first: int, last: int, window: int, head_dim: int, align: int, edge: int) -> Section:
    """Bands of about the same number of whole heads that fit edge channels wherever they start."""
    slack = align - math.gcd(head_dim, align)
    most = max(1, (edge - slack) // head_dim)
    bands = -(-(last - first) // most)
    span = -(-(last - first) // bands)
    reach = span * head_dim + slack
    columns = min(edge, _triton.power_of_two(reach))
    tiles = -(-reach // columns)
    return Section(first, last, head_dim, window, span, bands, columns, tiles)


def sections(
    num_heads: int,
    head_dim: int,
    windows: Sequence[int],
    channels: Sequence[int],
    align: int,
    edge: int,
) -> list[Section]:
    """Runs of heads of one window. A head with several, or in the middle of a group, takes the
    largest: the smaller kernels have zeros around them."""
    largest = [0] * num_heads
    first = 0
    for window, count in zip(windows, channels, strict=True):
        for head in range(first // head_dim, -(-(first + count) // head_dim)):
            largest[head] = max(largest[head], window)
        first += count
    starts = [h for h in range(num_heads) if h == 0 or largest[h] != largest[h - 1]]
    ends = [*starts[1:], num_heads]
    runs = zip(starts, ends, strict=True)
    return [section(a, b, largest[a], head_dim, align, edge) for a, b in runs]


class Taps(NamedTuple):
    """The convolutions of all groups, as kernels read them."""

    tensor: Tensor  # [LARGEST**2 + 1, WIDTH] float32
    arguments: dict[str, Any]
    blocks: int  # of channels, that programs spread and sum


def spread(
    problem: _tiles.Problem,
    weight: Tensor,
    bias: Tensor | None,
    windows: Sequence[int],
    channels: Sequence[int],
) -> Taps:
    """Lay out the flat weights and biases of these groups."""
    groups, first, place = [], 0, 0
    for window, count in zip(windows, channels, strict=True):
        groups += [first, window, place]
        first, place = first + count, place + count * window**2
    largest, width = max(windows, default=1), -(-first // 16) * 16
    block = min(64, _triton.power_of_two(width))
    arguments: dict[str, Any] = {
        **{"C": first, "WIDTH": width, "LARGEST": largest, "BLOCK": block},
        **{"GROUPS": tuple(groups), "COUNT": len(windows), "HAS_BIAS": bias is not None},
        "HAS_TAPS": len(windows) > 0,
    }
    rows = largest**2 + 1 if windows else 0
    taps = torch.empty(rows, width, dtype=torch.float32, device=weight.device)
    blocks = -(-width // block)
    if windows:
        given = {"weight": weight, "bias": weight if bias is None else bias, "taps": taps}
        programs = -(-rows // TAP_ROWS) * blocks
        launch(_spread_taps, programs, problem, arguments, given, {"ROWS": TAP_ROWS})
    return Taps(taps, arguments, blocks)


def launch(kernel: Any, programs: int, problem: _tiles.Problem, *given: dict[str, Any]) -> None:
    """Launch with those of the given arguments that the kernel takes."""
    every = {name: value for arguments in given for name, value in arguments.items()}
    chosen = {name: every[name] for name in kernel.arg_names}
    _triton.launch(kernel, programs, problem, **chosen)


def weight_gradients(
    problem: _tiles.Problem,
    taps: Taps,
    cut: Sequence[Section],
    common: dict[str, Any],
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the flat weights and biases (empty without). common: what `_weight_shares` takes
    besides the sizes of a section and of its tiles."""
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(0 if bias is None else bias.shape)
    edge = _triton.shape(problem, "weight_shares", weight.device).edge
    cut = [_of_channels(each, common["ALIGN"], edge) for each in cut]
    pixels = common["B"] * common["H"] * common["W"]
    shares = max(1, min(pixels // 256, PROGRAMS // 2 // sum(each.bands for each in cut)))
    parts = taps.tensor.new_empty(shares, *taps.tensor.shape)
    for each in cut:
        block = _triton.power_of_two(each.window, 1)
        tile = max(4, min(128, 8192 // (block * each.columns)))
        tiles = -(-common["H"] * common["W"] // tile)
        sizes = band_arguments([each]) | {"BK": block, "BT": tile, "tiles": tiles}
        sizes |= {"K": each.window, "per_share": -(-common["B"] * tiles // shares), "shares": parts}
        programs = each.window * each.bands * shares
        launch(_weight_shares, programs, problem, common, taps.arguments, sizes)
    programs = -(-taps.tensor.shape[0] // SUM_ROWS) * taps.blocks
    totals = {"grad_weight": grad_weight, "grad_bias": grad_bias, "shares": parts, "count": shares}
    sizes = {"SHARES": SHARES, "ROWS": SUM_ROWS}
    launch(_sum_shares, programs, problem, taps.arguments, totals, sizes)
    return grad_weight, grad_bias


def _of_channels(each: Section, align: int, edge: int) -> Section:
    """The same channels in bands that need not hold whole heads."""
    first, last = each.first * each.head_dim, each.last * each.head_dim
    unit = math.gcd(align, first, last)
    return section(first // unit, last // unit, each.window, unit, align, edge)


def band_arguments(cut: Sequence[Section]) -> dict[str, Any]:
    """The sections by the names of the kernels' parameters."""
    table: list[int] = []
    bands = 0
    for each in cut:
        table += [bands, each.first, each.span, each.last, each.window]
        bands += each.bands
    return {
        **{"SECTIONS": tuple(table), "N_SECTIONS": len(cut), "bands": bands, "D": cut[0].head_dim},
        **{"BC": max(each.columns for each in cut), "TILES": max(each.tiles for each in cut)},
    }


def in_runs(sizes: dict[str, Any]) -> dict[str, int]:
    """How tokens are shared out where each stands for itself: runs of tiles, whose convolutions
    read the same rows of the image."""
    tile = min(128, 2048 // sizes["BC"])  # 16 values a thread of 4 warps
    tiles, units = -(-sizes["N"] // tile), sizes["B"] * sizes["bands"] * sizes["TILES"]
    runs = max(1, min(tiles // 2, PROGRAMS // units))
    per_run = -(-tiles // runs)
    runs = -(-tiles // per_run)
    return {"BT": tile, "per_run": per_run, "runs": runs, "programs": units * runs}


def alignment(channels: int, *strides: int) -> dict[str, int]:
    """ALIGN: channels of the vectors that bands start and end with. UNIT: what divides all strides;
    they are passed without it, so that the compiler knows."""
    return {"ALIGN": math.gcd(channels, 8), "UNIT": math.gcd(16, *strides)}
