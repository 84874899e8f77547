"""The gradients of conv-relative attention in Triton.

With P = softmax(K), A = P^T V, out = s Q A + Q * (conv(V) + b), grad_out G and E = Q * G:

    dA = s Q^T G      dQ = s G A^T + G * (conv(V) + b)      dV = P dA + conv^T(E)
    dK = P * (V dA^T - rowsum(dA * A))      dw = E correlated with V      db = sum of E

A and the statistics of the softmax are the forward's, E is formed where it is read. One pass over
the tokens for dA, one for the gradients of qkv, one for those of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._registration import register_triton
from .._triton import LOG2E, dot
from .triton_convolution import (
    band_of,
    convolve,
    in_runs,
    launch,
    load_bias,
    spread,
    store_band,
    tokens_of,
    weight_gradients,
)
from .triton_kernels import Call, load_matrix, load_rows, places, plan


@triton.jit
def _backward_context(
    grad_out, qkv, grad_context, grad_stride_b, grad_stride_n, stride_b, stride_n,
    B, N, parts, per_part, bands, scale,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr,
    ALIGN: tl.constexpr, UNIT: tl.constexpr, SECTIONS: tl.constexpr, N_SECTIONS: tl.constexpr,
    BT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_context [parts, B, C, D] = s Q^T G of runs of tokens; grid as _forward_context."""
    tile_g, tile_q = tl.program_id(0) % TILES, tl.program_id(0) // TILES % TILES
    unit = tl.program_id(0) // (TILES * TILES)
    band, part = unit % bands, unit // bands % parts
    image = (unit // (bands * parts)).to(tl.int64)
    start, end, low, high, _ = band_of(band, D, ALIGN, SECTIONS, N_SECTIONS)
    i = start + tile_q * BC + tl.arange(0, BC)
    j = start + tile_g * BC + tl.arange(0, BC)
    qkv += image * stride_b * UNIT
    grad_out += image * grad_stride_b * UNIT
    total = tl.zeros((BC, BC), tl.float32)
    for step in range(per_part):
        n = tokens_of(part * per_part + step, BT, WIDE)
        q = load_rows(qkv, stride_n * UNIT, n, n < N, i, end)
        g = load_rows(grad_out, grad_stride_n * UNIT, n, n < N, j, end)
        total += dot(tl.trans(q), g, PRECISION)
    at, together = places(i, j, low, high, D, D)
    tl.store(grad_context + (part * B + image) * C * D + at, total * scale, mask=together)


@triton.jit
def _times_transposed(
    pointer, stride, matrix, n, N, c, tile, start, end, low, high, D: tl.constexpr,
    ROW: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows [n, all of the head] times the transposed matrix [c, all of the head]."""
    total = tl.zeros((n.shape[0], c.shape[0]), tl.float32)
    for other in range(TILES):
        j = c + (other - tile) * c.shape[0]
        rows = load_rows(pointer, stride, n, n < N, j, end)
        block = load_matrix(matrix, c, j, low, high, D, ROW).to(rows.dtype)
        total += dot(rows, tl.trans(block), PRECISION)
    return total


@triton.jit
def _weights(k, i, state, low, high, D: tl.constexpr):
    """P of the keys k [n, i]; zero beyond the band's heads."""
    own = (i >= low) & (i < high)
    highest = tl.load(state + i * (D + 2) + D, mask=own, other=0.0)
    inverse = tl.load(state + i * (D + 2) + D + 1, mask=own, other=0.0)
    p = tl.exp2((k.to(tl.float32) - highest[None, :]) * LOG2E) * inverse[None, :]
    return tl.where(own[None, :], p, 0.0)


@triton.jit
def _backward(
    grad_out, qkv, taps, state, grad_context, grad_qkv, grad_stride_b, grad_stride_n,
    stride_b, stride_n, N, prefix, H, W, runs, per_run, bands, scale,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr,
    ALIGN: tl.constexpr, UNIT: tl.constexpr, SECTIONS: tl.constexpr, N_SECTIONS: tl.constexpr,
    EDGES: tl.constexpr, BT: tl.constexpr, HAS_TAPS: tl.constexpr, LARGEST: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_qkv [B, N, 3C] of a run of tokens; grid as _forward."""
    tile = tl.program_id(0) % TILES
    unit = tl.program_id(0) // TILES
    band, run = unit % bands, unit // bands % runs
    image = (unit // (bands * runs)).to(tl.int64)
    start, end, low, high, window = band_of(band, D, ALIGN, SECTIONS, N_SECTIONS)
    c = start + tile * BC + tl.arange(0, BC)
    qkv += image * stride_b * UNIT
    grad_out += image * grad_stride_b * UNIT
    grad_qkv += image * N * 3 * C
    state += image * C * (D + 2)
    grad_context += image * C * D
    stride_n, grad_stride_n = stride_n * UNIT, grad_stride_n * UNIT
    delta = tl.zeros((BC,), tl.float32)
    for part in range(TILES):
        j = c + (part - tile) * BC
        context = load_matrix(state, c, j, low, high, D, D + 2)
        # rounded as in the product that delta is subtracted from
        change = load_matrix(grad_context, c, j, low, high, D, D).to(qkv.dtype.element_ty)
        delta += tl.sum(context * change.to(tl.float32), 1)
    if TILES == 1:
        context = load_matrix(state, c, c, low, high, D, D + 2).to(qkv.dtype.element_ty)
        change = load_matrix(grad_context, c, c, low, high, D, D).to(qkv.dtype.element_ty)
    for step in range(per_run):
        n = tokens_of(run * per_run + step, BT, WIDE)
        inside = n < N
        g = load_rows(grad_out, grad_stride_n, n, inside, c, end)
        if TILES == 1:
            dq = dot(g, tl.trans(context), PRECISION)
        else:
            dq = _times_transposed(
                grad_out, grad_stride_n, state, n, N, c, tile, start, end, low, high,
                D, D + 2, TILES, PRECISION,
            )  # fmt: skip
        dq *= scale
        if HAS_TAPS:
            relative = load_bias(taps, c, end, LARGEST, WIDTH)
            relative += convolve(
                qkv + 2 * C, stride_n, qkv, stride_n, taps, n, prefix, H, W, c, end, window,
                LARGEST, WIDTH, False, False,
            )  # fmt: skip
            dq += tl.where((n >= prefix)[:, None], g.to(tl.float32) * relative, 0.0)
        to = grad_qkv + n[:, None] * (3 * C) + c[None, :]
        store_band(to, dq, inside, c, low, high, ALIGN, EDGES)

        k = load_rows(qkv + C, stride_n, n, inside, c, end)
        p = _weights(k, c, state, low, high, D)
        if TILES == 1:
            dv = dot(p.to(k.dtype), change, PRECISION)
        else:
            dv = tl.zeros((BT, BC), tl.float32)
            for other in range(TILES):
                i = c + (other - tile) * BC
                k = load_rows(qkv + C, stride_n, n, inside, i, end)
                block = load_matrix(grad_context, i, c, low, high, D, D).to(k.dtype)
                dv += dot(_weights(k, i, state, low, high, D).to(k.dtype), block, PRECISION)
        if HAS_TAPS:
            back = convolve(
                grad_out, grad_stride_n, qkv, stride_n, taps, n, prefix, H, W, c, end, window,
                LARGEST, WIDTH, True, True,
            )  # fmt: skip
            dv += tl.where((n >= prefix)[:, None], back, 0.0)
        store_band(to + 2 * C, dv, inside, c, low, high, ALIGN, EDGES)

        if TILES == 1:
            v = load_rows(qkv + 2 * C, stride_n, n, inside, c, end)
            dp = dot(v, tl.trans(change), PRECISION)
        else:
            dp = _times_transposed(
                qkv + 2 * C, stride_n, grad_context, n, N, c, tile, start, end, low, high,
                D, D, TILES, PRECISION,
            )  # fmt: skip
        store_band(to + C, p * (dp - delta[None, :]), inside, c, low, high, ALIGN, EDGES)


def convrel_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    state: Tensor,
    windows: Sequence[int],
    channels: Sequence[int],
    num_heads: int,
    grid_h: int,
    grid_w: int,
    num_prefix_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, conv_weight and conv_bias (empty where it is None)."""
    grad_out, qkv, state = _triton.dense(grad_out), _triton.dense(qkv), state.contiguous()
    grid = (grid_h, grid_w)
    call = plan(qkv, grad_out, windows, channels, num_heads, grid, num_prefix_tokens, scale)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if not qkv.numel():
        return grad_qkv, *_no_gradients(conv_weight, conv_bias)
    common = call.arguments | {"grad_out": grad_out, "state": state}
    common |= {"grad_context": _grad_context(call, grad_out, state)}
    taps = spread(call.problem, conv_weight, conv_bias, windows, channels)
    sizes = taps.arguments | common | call.bands
    runs = in_runs(sizes)
    results = {"taps": taps.tensor, "grad_qkv": grad_qkv}
    launch(_backward, runs["programs"], call.problem, sizes, runs, results)
    if not windows:
        return grad_qkv, *_no_gradients(conv_weight, conv_bias)
    common |= {"grad": grad_out, "factors": qkv, "values": qkv[..., 2 * call.arguments["C"] :]}
    common |= {"FACTORS": True}
    gradients = weight_gradients(call.problem, taps, call.cut, common, conv_weight, conv_bias)
    return grad_qkv, *gradients


def _grad_context(call: Call, grad_out: Tensor, state: Tensor) -> Tensor:
    """[B, heads, D, D]: the gradient of softmax(K)^T V."""
    parts = call.in_parts(64)
    count = parts["parts"]
    grad_context = state.new_empty(count, *state.shape[:-1], state.shape[-2])
    sizes = call.arguments | call.heads
    given = {"grad_out": grad_out, "grad_context": grad_context}
    launch(_backward_context, parts["programs"], call.problem, sizes, parts, given)
    return grad_context.sum(0) if count > 1 else grad_context[0]


def _no_gradients(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return weight.new_zeros(weight.shape), weight.new_zeros(0 if bias is None else bias.shape)


register_triton("convrel_bwd", convrel_bwd)
