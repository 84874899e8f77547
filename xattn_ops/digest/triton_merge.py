"""Token merge and enhancement in Triton: two depthwise convolutions over tokens where they lie.

A program takes one row of outputs, a tile of columns and CHANNELS channels. The programs of both
convolutions make one launch, so that what they read of the tokens is in cache for the other. The
gradients of the weights are shares [shares, k, k, C], a run of rows each, summed in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tiles, _triton
from .._registration import register_triton

CHANNELS = 64  # lines of 128 bytes of bfloat16
SHARES = 64  # at most, of a weight's gradient


@triton.jit
def _convolve(
    x, weight, image, y, ox, c, stride_b, stride_n, prefix, rows, columns, C,
    STRIDE: tl.constexpr, K: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Outputs [BX, BC] at the columns ox of the row y; weight [K, K, C]."""
    total = tl.zeros((BX, BC), tl.float32)
    for ky in range(K):
        iy = y * STRIDE + ky - K // 2
        for kx in tl.static_range(K):
            ix = ox * STRIDE + kx - K // 2
            inside = (iy >= 0) & (iy < rows) & (ix >= 0) & (ix < columns)
            token = (prefix + iy * columns + ix).to(tl.int64)
            at = x + image * stride_b + (token * stride_n)[:, None] + c[None, :]
            values = tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0)
            tap = tl.load(weight + (ky * K + kx) * C + c, mask=c < C, other=0.0)
            total += values.to(tl.float32) * tap.to(tl.float32)[None, :]
    return total


@triton.jit
def _merge_and_enhance(
    x, merge, enhance, bias, digests, enhanced, stride_b, stride_n,
    prefix, rows, columns, C, merged_rows, merged_columns, row_tiles, merged_tiles, channel_tiles,
    images, KM: tl.constexpr, KE: tl.constexpr, STRIDE: tl.constexpr, BX: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid: images x (rows of enhanced x column tiles, then rows of digests x column tiles) x
    channel tiles."""
    c = tl.program_id(0) % channel_tiles * BC + tl.arange(0, BC)
    place = tl.program_id(0) // channel_tiles
    each = rows * row_tiles + merged_rows * merged_tiles
    image = (place // each).to(tl.int64)
    place = place % each
    if place < rows * row_tiles:
        y = place // row_tiles
        ox = place % row_tiles * BX + tl.arange(0, BX)
        total = _convolve(
            x, enhance, image, y, ox, c, stride_b, stride_n, prefix, rows, columns, C,
            1, KE, BX, BC,
        )  # fmt: skip
        if HAS_BIAS:
            total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        token = (prefix + y * columns + ox).to(tl.int64)
        to = enhanced + image * (prefix + rows * columns) * C + (token * C)[:, None] + c[None, :]
        mask = (ox < columns)[:, None] & (c < C)[None, :]
        tl.store(to, total.to(enhanced.dtype.element_ty), mask=mask)
    else:  # other names: a variable has one shape in both branches
        part = place - rows * row_tiles
        my = part // merged_tiles
        mx = part % merged_tiles * BM + tl.arange(0, BM)
        merged = _convolve(
            x, merge, image, my, mx, c, stride_b, stride_n, prefix, rows, columns, C,
            STRIDE, KM, BM, BC,
        )  # fmt: skip
        digest = (my * merged_columns + mx).to(tl.int64)
        there = (mx < merged_columns)[:, None] & (c < C)[None, :]
        tl.store(
            digests + image * merged_rows * merged_columns * C + (digest * C)[:, None] + c[None, :],
            merged.to(digests.dtype.element_ty),
            mask=there,
        )


@triton.jit
def _scatter(
    grad, weight, image, y, x, c, stride_b, stride_n, prefix, rows, columns, C, total,
    STRIDE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """total [BX, BC] plus what the inputs at the columns x of the row y get from the outputs
    [rows, columns] of a convolution."""
    for ky in range(K):
        oy = y + K // 2 - ky  # times STRIDE
        row = (oy >= 0) & (oy < rows * STRIDE) & (oy % STRIDE == 0)
        for kx in tl.static_range(K):
            ox = x + K // 2 - kx
            inside = row & (ox >= 0) & (ox < columns * STRIDE) & (ox % STRIDE == 0)
            token = (prefix + oy // STRIDE * columns + ox // STRIDE).to(tl.int64)
            at = grad + image * stride_b + (token * stride_n)[:, None] + c[None, :]
            values = tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0)
            tap = tl.load(weight + (ky * K + kx) * C + c, mask=c < C, other=0.0)
            total += values.to(tl.float32) * tap.to(tl.float32)[None, :]
    return total


@triton.jit
def _input_gradient(
    grad_digests, grad_enhanced, merge, enhance, grad_x,
    digest_stride_b, digest_stride_n, grad_stride_b, grad_stride_n,
    prefix, rows, columns, C, merged_rows, merged_columns, row_tiles, channel_tiles,
    KM: tl.constexpr, KE: tl.constexpr, STRIDE: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr,
    MERGED: tl.constexpr, ENHANCED: tl.constexpr,
):  # fmt: skip
    """Gradient of the image tokens. Grid: images x rows x column tiles x channel tiles."""
    c = tl.program_id(0) % channel_tiles * BC + tl.arange(0, BC)
    place = tl.program_id(0) // channel_tiles
    x = place % row_tiles * BX + tl.arange(0, BX)
    y = place // row_tiles % rows
    image = (place // (row_tiles * rows)).to(tl.int64)
    total = tl.zeros((BX, BC), tl.float32)
    if ENHANCED:
        total = _scatter(
            grad_enhanced, enhance, image, y, x, c, grad_stride_b, grad_stride_n, prefix,
            rows, columns, C, total, 1, KE,
        )  # fmt: skip
    if MERGED:
        total = _scatter(
            grad_digests, merge, image, y, x, c, digest_stride_b, digest_stride_n, 0,
            merged_rows, merged_columns, C, total, STRIDE, KM,
        )  # fmt: skip
    token = (prefix + y * columns + x).to(tl.int64)
    to = grad_x + image * (prefix + rows * columns) * C + (token * C)[:, None] + c[None, :]
    mask = (x < columns)[:, None] & (c < C)[None, :]
    tl.store(to, total.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def _weight_shares(
    grad, x, weight_sums, bias_sums, grad_stride_b, grad_stride_n, stride_b, stride_n,
    grad_prefix, prefix, rows, columns, C, out_rows, out_columns, channel_tiles, all_rows,
    per_program, K: tl.constexpr, KB: tl.constexpr, STRIDE: tl.constexpr, BX: tl.constexpr,
    BC: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """weight_sums [shares, K, K, C] and bias_sums [shares, C], each of per_program rows of outputs
    out of all images. Grid: shares x rows of the window x channel tiles."""
    c = tl.program_id(0) % channel_tiles * BC + tl.arange(0, BC)
    ky = tl.program_id(0) // channel_tiles % K
    share = tl.program_id(0) // (channel_tiles * K)
    taps = tl.arange(0, KB)
    sums = tl.zeros((KB, BC), tl.float32)
    bias_sum = tl.zeros((BC,), tl.float32)
    for step in range(min(per_program, all_rows - share * per_program)):
        row = share * per_program + step
        image = (row // out_rows).to(tl.int64)
        oy = row % out_rows
        iy = oy * STRIDE + ky - K // 2
        for start in range(0, out_columns, BX):
            ox = start + tl.arange(0, BX)
            token = (grad_prefix + oy * out_columns + ox).to(tl.int64)
            at = grad + image * grad_stride_b + (token * grad_stride_n)[:, None] + c[None, :]
            mask = (ox < out_columns)[:, None] & (c < C)[None, :]
            g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            bias_sum += tl.sum(g, 0)
            for kx in tl.static_range(K):
                ix = ox * STRIDE + kx - K // 2
                inside = (iy >= 0) & (iy < rows) & (ix >= 0) & (ix < columns)
                token = (prefix + iy * columns + ix).to(tl.int64)
                at = x + image * stride_b + (token * stride_n)[:, None] + c[None, :]
                values = tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0)
                part = tl.sum(g * values.to(tl.float32), 0)
                sums += tl.where((taps == kx)[:, None], part[None, :], 0.0)
    share = share.to(tl.int64)
    to = weight_sums + ((share * K + ky) * K + taps[:, None]) * C + c[None, :]
    tl.store(to, sums, mask=(taps < K)[:, None] & (c < C)[None, :])
    if HAS_BIAS and ky == 0:
        tl.store(bias_sums + share * C + c, bias_sum, mask=c < C)


def _taps(weight: Tensor | None, other: Tensor) -> Tensor:
    """[C, 1, k, k] -> [k, k, C], dense in channels; `other` where there is none."""
    return other if weight is None else weight.squeeze(1).permute(1, 2, 0).contiguous()


def _sizes(
    x: Tensor, merge_weight: Tensor | None, grid: tuple[int, int], stride: int, prefix: int
) -> dict[str, Any]:
    """What all kernels take; without a merge the digests have no rows."""
    (rows, columns), C = grid, x.shape[2]
    tile = _tile(x, columns)
    merged = (0, 0) if merge_weight is None else (-(-rows // stride), -(-columns // stride))
    return {
        **{"prefix": prefix, "rows": rows, "columns": columns, "C": C},
        **{"merged_rows": merged[0], "merged_columns": merged[1]},
        "channel_tiles": -(-C // CHANNELS),
        "KM": 1 if merge_weight is None else merge_weight.shape[-1],
        **{"STRIDE": stride, "BX": tile, "BC": CHANNELS},
        "row_tiles": -(-columns // tile),
    }


def _problem(x: Tensor) -> _tiles.Problem:
    return _tiles.Problem("merge", x.shape[2], x.shape[1], x.dtype)


def _tile(x: Tensor, columns: int) -> int:
    edge = _triton.shape(_problem(x), "merge_and_enhance", x.device).edge
    return min(edge, _triton.power_of_two(columns, 4))


def merge_fwd(
    x: Tensor,
    merge_weight: Tensor | None,
    enhance_weight: Tensor,
    enhance_bias: Tensor | None,
    grid_h: int,
    grid_w: int,
    stride: int,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor]:
    """digests [B, m, C] (m = 0 without a merge) and enhanced [B, N, C]."""
    x = _triton.dense(x)
    B, _, C = x.shape
    sizes = _sizes(x, merge_weight, (grid_h, grid_w), stride, num_prefix_tokens)
    digests = x.new_empty(B, sizes["merged_rows"] * sizes["merged_columns"], C)
    enhanced = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return digests, enhanced
    enhanced[:, :num_prefix_tokens] = x[:, :num_prefix_tokens]
    tile = _tile(x, max(1, sizes["merged_columns"]))
    tiles = -(-sizes["merged_columns"] // tile)
    each = grid_h * sizes["row_tiles"] + sizes["merged_rows"] * tiles
    tensors: dict[str, Any] = {
        "x": x,
        "merge": _taps(merge_weight, x),
        "enhance": _taps(enhance_weight, x),
        "bias": x if enhance_bias is None else enhance_bias.contiguous(),
        **{"digests": digests, "enhanced": enhanced},
        **{"stride_b": x.stride(0), "stride_n": x.stride(1)},
    }
    _triton.launch(
        _merge_and_enhance, B * each * sizes["channel_tiles"], _problem(x), **tensors, **sizes,
        merged_tiles=tiles, images=B, KE=enhance_weight.shape[-1], BM=tile,
        HAS_BIAS=enhance_bias is not None,
    )  # fmt: skip
    return digests, enhanced


def merge_bwd(
    grad_digests: Tensor | None,
    grad_enhanced: Tensor | None,
    x: Tensor,
    merge_weight: Tensor | None,
    enhance_weight: Tensor,
    enhance_bias: Tensor | None,
    grid_h: int,
    grid_w: int,
    stride: int,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the two weights and the bias (empty where the argument is None). An output
    whose gradient is None has no part in them."""
    x = _triton.dense(x)
    P = num_prefix_tokens
    sizes = _sizes(x, merge_weight, (grid_h, grid_w), stride, P)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_merge, grad_enhance, grad_bias = (
        x.new_zeros(0 if t is None else t.shape)
        for t in (merge_weight, enhance_weight, enhance_bias)
    )
    if not x.numel():
        return grad_x, grad_merge, grad_enhance, grad_bias
    if grad_enhanced is None:
        grad_x[:, :P] = 0
    else:
        grad_x[:, :P] = grad_enhanced[:, :P]
    if merge_weight is None:
        grad_digests = None
    merged = x if grad_digests is None else _triton.dense(grad_digests)
    enhanced = x if grad_enhanced is None else _triton.dense(grad_enhanced)
    tensors: dict[str, Any] = {
        **{"grad_digests": merged, "grad_enhanced": enhanced, "grad_x": grad_x},
        **{"merge": _taps(merge_weight, x), "enhance": _taps(enhance_weight, x)},
        **{"digest_stride_b": merged.stride(0), "digest_stride_n": merged.stride(1)},
        **{"grad_stride_b": enhanced.stride(0), "grad_stride_n": enhanced.stride(1)},
    }
    _triton.launch(
        _input_gradient, x.shape[0] * grid_h * sizes["row_tiles"] * sizes["channel_tiles"],
        _problem(x), **tensors, **sizes, KE=enhance_weight.shape[-1],
        MERGED=grad_digests is not None, ENHANCED=grad_enhanced is not None,
    )  # fmt: skip
    if grad_digests is not None and merge_weight is not None:
        outs = (sizes["merged_rows"], sizes["merged_columns"])
        grad_merge, _ = _weight_gradient(merged, 0, x, merge_weight, outs, stride, sizes)
    if grad_enhanced is not None:
        grad_enhance, sums = _weight_gradient(
            enhanced, P, x, enhance_weight, (grid_h, grid_w), 1, sizes
        )
        grad_bias = grad_bias if enhance_bias is None else sums
    return grad_x, grad_merge, grad_enhance, grad_bias


def _weight_gradient(
    grad: Tensor,
    grad_prefix: int,
    x: Tensor,
    weight: Tensor,
    outs: tuple[int, int],
    stride: int,
    sizes: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Of one convolution: the gradients of its weight [C, 1, k, k] and of a bias [C]."""
    K, C, rows = weight.shape[-1], x.shape[2], x.shape[0] * outs[0]
    per_program = -(-rows // min(rows, SHARES))
    shares = -(-rows // per_program)
    weight_sums = torch.empty(shares, K, K, C, dtype=torch.float32, device=x.device)
    bias_sums = torch.empty(shares, C, dtype=torch.float32, device=x.device)
    tensors: dict[str, Any] = {
        **{"grad": grad, "x": x, "weight_sums": weight_sums, "bias_sums": bias_sums},
        **{"grad_stride_b": grad.stride(0), "grad_stride_n": grad.stride(1)},
        **{"stride_b": x.stride(0), "stride_n": x.stride(1)},
        **{name: sizes[name] for name in ("prefix", "rows", "columns", "C", "channel_tiles", "BC")},
    }
    _triton.launch(
        _weight_shares, shares * K * sizes["channel_tiles"], _problem(x), **tensors,
        grad_prefix=grad_prefix, out_rows=outs[0], out_columns=outs[1], all_rows=rows,
        per_program=per_program, K=K, KB=triton.next_power_of_2(K), STRIDE=stride,
        BX=_tile(x, outs[1]), HAS_BIAS=True,
    )  # fmt: skip
    grad_weight = weight_sums.sum(0).permute(2, 0, 1)[:, None].to(weight.dtype).contiguous()
    return grad_weight, bias_sums.sum(0).to(weight.dtype)


register_triton("merge_fwd", merge_fwd)
register_triton("merge_bwd", merge_bwd)
