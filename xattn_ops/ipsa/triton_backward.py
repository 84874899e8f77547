"""The gradients of inner-patch self-attention in Triton.

A window of one tile takes one kernel, which recomputes the weights and keeps the gradient of the
bias in registers through its run of windows. Larger windows take three: rows (statistics of the
softmax, gradient of q), columns (gradients of k and v), and the bias. What programs sum over their
windows they store, and `_sum_bias` adds these shares up in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._registration import register_triton
from .._triton import dot, keep_weights
from .triton_kernels import ROWS, Call, _bias, _load, _place, _rows, _scores, plan


@triton.jit
def _backward(
    grad_out, qkv, bias, pad, seed, grad_qkv, bias_sums, pad_sums,
    grad_stride_b, grad_stride_y, grad_stride_x,
    stride_b, stride_y, stride_x, H, W, windows, windows_y, windows_x,
    shift_y, shift_x, per_program, scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    BT: tl.constexpr, TILES: tl.constexpr, SHIFTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_PAD: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients of per_program windows of one tile each; grid: groups of windows x heads.

    bias_sums [groups, heads, BT, BT] and pad_sums [groups, heads, 2 (k, v), BD] are this group's
    shares of the gradients of the bias and of the padding token (whose query is cropped).
    """
    C: tl.constexpr = HEADS * D
    head, group = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    first = group * per_program
    d, t = tl.arange(0, BD), tl.arange(0, BT)
    tile_bias = _bias(bias, head, t, t, WH * WW, TILES * BT, HAS_BIAS)
    bias_sum = tl.zeros((BT, BT), tl.float32)
    pad_k = tl.zeros((BD,), tl.float32)
    pad_v = tl.zeros((BD,), tl.float32)
    qkv += head * D
    pad += head * D
    for step in range(min(per_program, windows - first)):
        window = first + step
        image, y, x, region, inside, padding = _place(
            window, t, H, W, windows_y, windows_x, shift_y, shift_x, WH, WW, WIDE
        )
        mask = inside[:, None] & (d < D)[None, :]
        rows = _rows(qkv + image * stride_b, y, x, stride_y, stride_x, d)
        q = _load(rows, inside, padding, pad, d, D, HAS_PAD)
        k = _load(rows + C, inside, padding, pad + C, d, D, HAS_PAD)
        v = _load(rows + 2 * C, inside, padding, pad + 2 * C, d, D, HAS_PAD)
        grad_base = grad_out + image * grad_stride_b + head * D
        do = tl.load(_rows(grad_base, y, x, grad_stride_y, grad_stride_x, d), mask=mask, other=0.0)
        s = _scores(q, k, tile_bias, t, region, region, scale, WH * WW, SHIFTED, PRECISION)
        e = tl.exp2(s - tl.max(s, 1)[:, None])
        p = e / tl.sum(e, 1)[:, None]
        dp = dot(do, tl.trans(v), PRECISION)
        kept = p
        if DROPOUT:
            unit = window.to(tl.int64) * HEADS + head
            blocks = tl.arange(0, BT // 4)
            keep = keep_weights(seed, unit, blocks, t, WH * WW, threshold, keep_scale)
            kept = p * keep
            dp *= keep
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if HAS_BIAS:
            bias_sum += ds
        ds = ds.to(q.dtype)
        dq = dot(ds, k, PRECISION) * scale
        dk = dot(tl.trans(ds), q, PRECISION) * scale
        dv = dot(tl.trans(kept.to(q.dtype)), do, PRECISION)
        if HAS_PAD:
            pad_k += tl.sum(tl.where(padding[:, None], dk, 0.0), 0)
            pad_v += tl.sum(tl.where(padding[:, None], dv, 0.0), 0)
        to = _rows(grad_qkv + image * H * W * 3 * C + head * D, y, x, W * 3 * C, 3 * C, d)
        tl.store(to, dq.to(q.dtype), mask=mask)
        tl.store(to + C, dk.to(q.dtype), mask=mask)
        tl.store(to + 2 * C, dv.to(q.dtype), mask=mask)
    part = (group * HEADS + head).to(tl.int64)
    if HAS_BIAS:
        tl.store(bias_sums + part * BT * BT + t[:, None] * BT + t[None, :], bias_sum)
    if HAS_PAD:
        tl.store(pad_sums + part * 2 * BD + d, pad_k)
        tl.store(pad_sums + part * 2 * BD + BD + d, pad_v)


@triton.jit
def _tile(
    q, k, v, do, bias, tq, tk, region_q, region_k, lse, delta, unit, seed, scale,
    threshold, keep_scale, TOKENS: tl.constexpr, SHIFTED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCKS: tl.constexpr, query_tile,
):  # fmt: skip
    """The weights of a tile as they met v, and the gradient of its logits."""
    s = _scores(q, k, bias, tq, region_q, region_k, scale, TOKENS, SHIFTED, PRECISION)
    p = tl.exp2(s - lse[:, None])
    dp = dot(do, tl.trans(v), PRECISION)
    kept = p
    if DROPOUT:
        blocks = query_tile * BLOCKS + tl.arange(0, BLOCKS)
        keep = keep_weights(seed, unit, blocks, tk, TOKENS, threshold, keep_scale)
        kept = p * keep
        dp *= keep
    return kept.to(q.dtype), p * (dp - delta[:, None])


@triton.jit
def _backward_rows(
    grad_out, qkv, bias, pad, seed, grad_qkv, statistics,
    grad_stride_b, grad_stride_y, grad_stride_x,
    stride_b, stride_y, stride_x, H, W, windows, windows_y, windows_x,
    shift_y, shift_x, per_program, scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    BT: tl.constexpr, TILES: tl.constexpr, SHIFTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_PAD: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of q, and statistics [windows, heads, 2, TILES * BT]: of each row the log2 of the
    sum of its weights, and the product of its weights with their gradients. Grid as forward."""
    C: tl.constexpr = HEADS * D
    head = tl.program_id(0) % HEADS
    query_tile = tl.program_id(0) // HEADS % TILES
    first = tl.program_id(0) // (HEADS * TILES) * per_program
    d, t = tl.arange(0, BD), tl.arange(0, BT)
    tq = query_tile * BT + t
    qkv += head * D
    pad += head * D
    for step in range(min(per_program, windows - first)):
        window = first + step
        image, y, x, region_q, inside_q, padding_q = _place(
            window, tq, H, W, windows_y, windows_x, shift_y, shift_x, WH, WW, WIDE
        )
        mask = inside_q[:, None] & (d < D)[None, :]
        base = qkv + image * stride_b
        rows = _rows(base, y, x, stride_y, stride_x, d)
        q = _load(rows, inside_q, padding_q, pad, d, D, HAS_PAD)
        grad_base = grad_out + image * grad_stride_b + head * D
        do = tl.load(_rows(grad_base, y, x, grad_stride_y, grad_stride_x, d), mask=mask, other=0.0)
        to = _rows(grad_qkv + image * H * W * 3 * C + head * D, y, x, W * 3 * C, 3 * C, d)
        unit = window.to(tl.int64) * HEADS + head
        highest = tl.full((BT,), float("-inf"), tl.float32)
        total = tl.zeros((BT,), tl.float32)
        delta = tl.zeros((BT,), tl.float32)
        for tile in range(TILES):
            tk = tile * BT + t
            image, y, x, region, inside, padding = _place(
                window, tk, H, W, windows_y, windows_x, shift_y, shift_x, WH, WW, WIDE
            )
            rows = _rows(base, y, x, stride_y, stride_x, d)
            k = _load(rows + C, inside, padding, pad + C, d, D, HAS_PAD)
            v = _load(rows + 2 * C, inside, padding, pad + 2 * C, d, D, HAS_PAD)
            tile_bias = _bias(bias, head, tq, tk, WH * WW, TILES * BT, HAS_BIAS)
            s = _scores(q, k, tile_bias, tq, region_q, region, scale, WH * WW, SHIFTED, PRECISION)
            above = tl.maximum(highest, tl.max(s, 1))
            level = tl.where(above == float("-inf"), 0.0, above)  # a tile of strangers
            e = tl.exp2(s - level[:, None])
            dp = dot(do, tl.trans(v), PRECISION)
            if DROPOUT:
                blocks = query_tile * (BT // 4) + tl.arange(0, BT // 4)
                dp *= keep_weights(seed, unit, blocks, tk, WH * WW, threshold, keep_scale)
            before = tl.exp2(highest - level)
            total = total * before + tl.sum(e, 1)
            delta = delta * before + tl.sum(e * dp, 1)
            highest = above
        lse = highest + tl.log2(total)
        delta /= total
        place = statistics + unit * 2 * TILES * BT + tq
        tl.store(place, lse)
        tl.store(place + TILES * BT, delta)
        dq = tl.zeros((BT, BD), tl.float32)
        for tile in range(TILES):
            tk = tile * BT + t
            image, y, x, region, inside, padding = _place(
                window, tk, H, W, windows_y, windows_x, shift_y, shift_x, WH, WW, WIDE
            )
            rows = _rows(base, y, x, stride_y, stride_x, d)
            k = _load(rows + C, inside, padding, pad + C, d, D, HAS_PAD)
            v = _load(rows + 2 * C, inside, padding, pad + 2 * C, d, D, HAS_PAD)
            tile_bias = _bias(bias, head, tq, tk, WH * WW, TILES * BT, HAS_BIAS)
            _, ds = _tile(
                q, k, v, do, tile_bias, tq, tk, region_q, region, lse, delta, unit, seed, scale,
                threshold, keep_scale, WH * WW, SHIFTED, DROPOUT, PRECISION, BT // 4, query_tile,
            )  # fmt: skip
            dq += dot(ds.to(k.dtype), k, PRECISION)
        tl.store(to, (dq * scale).to(q.dtype), mask=mask)


@triton.jit
def _backward_columns(
    grad_out, qkv, bias, pad, seed, grad_qkv, statistics, pad_sums,
    grad_stride_b, grad_stride_y, grad_stride_x,
    stride_b, stride_y, stride_x, H, W, windows, windows_y, windows_x,
    shift_y, shift_x, per_program, scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    BT: tl.constexpr, TILES: tl.constexpr, SHIFTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_PAD: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v, and pad_sums [groups, TILES, heads, 2, BD]; grid as forward, over
    tiles of keys."""
    C: tl.constexpr = HEADS * D
    head = tl.program_id(0) % HEADS
    key_tile = tl.program_id(0) // HEADS % TILES
    first = tl.program_id(0) // (HEADS * TILES) * per_program
    d, t = tl.arange(0, BD), tl.arange(0, BT)
    tk = key_tile * BT + t
    pad_k = tl.zeros((BD,), tl.float32)
    pad_v = tl.zeros((BD,), tl.float32)
    qkv += head * D
    pad += head * D
    for step in range(min(per_program, windows - first)):
        window = first + step
        image, y, x, region, inside_k, padding_k = _place(
            window, tk, H, W, windows_y, windows_x, shift_y, shift_x, WH, WW, WIDE
        )
        base = qkv + image * stride_b
        rows = _rows(base, y, x, stride_y, stride_x, d)
        k = _load(rows + C, inside_k, padding_k, pad + C, d, D, HAS_PAD)
        v = _load(rows + 2 * C, inside_k, padding_k, pad + 2 * C, d, D, HAS_PAD)
        to = _rows(grad_qkv + image * H * W * 3 * C + head * D, y, x, W * 3 * C, 3 * C, d)
        grad_base = grad_out + image * grad_stride_b + head * D
        unit = window.to(tl.int64) * HEADS + head
        dk = tl.zeros((BT, BD), tl.float32)
        dv = tl.zeros((BT, BD), tl.float32)
        for tile in range(TILES):
            tq = tile * BT + t
            image, y, x, region_q, inside, padding = _place(
                window, tq, H, W, windows_y, windows_x, shift_y, shift_x, WH, WW, WIDE
            )
            mask = inside[:, None] & (d < D)[None, :]
            rows = _rows(base, y, x, stride_y, stride_x, d)
            q = _load(rows, inside, padding, pad, d, D, HAS_PAD)
            do = tl.load(
                _rows(grad_base, y, x, grad_stride_y, grad_stride_x, d), mask=mask, other=0.0
            )
            place = statistics + unit * 2 * TILES * BT + tq
            lse, delta = tl.load(place), tl.load(place + TILES * BT)
            tile_bias = _bias(bias, head, tq, tk, WH * WW, TILES * BT, HAS_BIAS)
            kept, ds = _tile(
                q, k, v, do, tile_bias, tq, tk, region_q, region, lse, delta, unit, seed, scale,
                threshold, keep_scale, WH * WW, SHIFTED, DROPOUT, PRECISION, BT // 4, tile,
            )  # fmt: skip
            dv += dot(tl.trans(kept), do, PRECISION)
            dk += dot(tl.trans(ds.to(q.dtype)), q, PRECISION)
        dk *= scale
        mask = inside_k[:, None] & (d < D)[None, :]
        tl.store(to + C, dk.to(k.dtype), mask=mask)
        tl.store(to + 2 * C, dv.to(k.dtype), mask=mask)
        if HAS_PAD:
            pad_k += tl.sum(tl.where(padding_k[:, None], dk, 0.0), 0)
            pad_v += tl.sum(tl.where(padding_k[:, None], dv, 0.0), 0)
    if HAS_PAD:
        to = pad_sums + tl.program_id(0).to(tl.int64) * 2 * BD + d
        tl.store(to, pad_k)
        tl.store(to + BD, pad_v)


@triton.jit
def _backward_bias(
    grad_out, qkv, bias, pad, seed, statistics, bias_sums,
    grad_stride_b, grad_stride_y, grad_stride_x,
    stride_b, stride_y, stride_x, H, W, windows, windows_y, windows_x,
    shift_y, shift_x, per_program, scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    BT: tl.constexpr, TILES: tl.constexpr, SHIFTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_PAD: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """bias_sums [groups, heads, TILES * BT, TILES * BT]; grid: groups x tiles x tiles x heads."""
    C: tl.constexpr = HEADS * D
    head = tl.program_id(0) % HEADS
    key_tile = tl.program_id(0) // HEADS % TILES
    query_tile = tl.program_id(0) // (HEADS * TILES) % TILES
    group = tl.program_id(0) // (HEADS * TILES * TILES)
    first = group * per_program
    d, t = tl.arange(0, BD), tl.arange(0, BT)
    tq, tk = query_tile * BT + t, key_tile * BT + t
    tile_bias = _bias(bias, head, tq, tk, WH * WW, TILES * BT, HAS_BIAS)
    bias_sum = tl.zeros((BT, BT), tl.float32)
    qkv += head * D
    pad += head * D
    for step in range(min(per_program, windows - first)):
        window = first + step
        image, y, x, region_k, inside, padding = _place(
            window, tk, H, W, windows_y, windows_x, shift_y, shift_x, WH, WW, WIDE
        )
        base = qkv + image * stride_b
        rows = _rows(base, y, x, stride_y, stride_x, d)
        k = _load(rows + C, inside, padding, pad + C, d, D, HAS_PAD)
        v = _load(rows + 2 * C, inside, padding, pad + 2 * C, d, D, HAS_PAD)
        image, y, x, region_q, inside, padding = _place(
            window, tq, H, W, windows_y, windows_x, shift_y, shift_x, WH, WW, WIDE
        )
        rows = _rows(base, y, x, stride_y, stride_x, d)
        q = _load(rows, inside, padding, pad, d, D, HAS_PAD)
        grad_base = grad_out + image * grad_stride_b + head * D
        rows = _rows(grad_base, y, x, grad_stride_y, grad_stride_x, d)
        do = tl.load(rows, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        unit = window.to(tl.int64) * HEADS + head
        place = statistics + unit * 2 * TILES * BT + tq
        lse, delta = tl.load(place), tl.load(place + TILES * BT)
        _, ds = _tile(
            q, k, v, do, tile_bias, tq, tk, region_q, region_k, lse, delta, unit, seed, scale,
            threshold, keep_scale, WH * WW, SHIFTED, DROPOUT, PRECISION, BT // 4, query_tile,
        )  # fmt: skip
        bias_sum += ds
    edge: tl.constexpr = TILES * BT
    to = bias_sums + (group * HEADS + head).to(tl.int64) * edge * edge
    tl.store(to + tq[:, None] * edge + tk[None, :], bias_sum)


@triton.jit
def _sum_bias(
    bias_sums, grad_table, groups,
    HEADS: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, EDGE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grad_table [bins, heads] from the shares [groups, heads, EDGE, EDGE]: a program takes a head
    and ROWS of the (2 WH - 1)(2 WW - 1) bins, and adds the pairs of tokens (query, query - offset)
    of each."""
    head = tl.program_id(0) % HEADS
    bin = (tl.program_id(0) // HEADS * ROWS + tl.arange(0, ROWS))[:, None]
    dy, dx = bin // (2 * WW - 1) - (WH - 1), bin % (2 * WW - 1) - (WW - 1)
    tq = tl.arange(0, BLOCK)[None, :]
    y, x = tq // WW - dy, tq % WW - dx  # of the key
    there = (tq < WH * WW) & (y >= 0) & (y < WH) & (x >= 0) & (x < WW)
    at = bias_sums + head * EDGE * EDGE + tq * EDGE + y * WW + x
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(groups):
        total += tl.load(at, mask=there, other=0.0)
        at += HEADS * EDGE * EDGE
    to = grad_table + bin * HEADS + head
    inside = bin < (2 * WH - 1) * (2 * WW - 1)
    tl.store(to, tl.sum(total, 1)[:, None].to(grad_table.dtype.element_ty), mask=inside)


def ipsa_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias_table and pad_qkv (empty where the argument is None)."""
    grad_out, qkv = _triton.dense(grad_out), _triton.dense(qkv)
    window, shift = (window_h, window_w), (shift_h, shift_w)
    options = (num_heads, window, shift, scale, dropout_p)
    call = plan(qkv, bias_table, pad_qkv, seed, *options, "backward")
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_table = qkv.new_zeros(0 if bias_table is None else bias_table.shape)
    grad_pad = qkv.new_zeros(0 if pad_qkv is None else pad_qkv.shape)
    if not qkv.numel():
        return grad_qkv, grad_table, grad_pad
    edge = call.tiles * call.tile
    block = call.arguments["BD"]
    wide: dict[str, Any] = {"dtype": torch.float32, "device": qkv.device}
    bias_sums = torch.empty(call.groups, num_heads, edge, edge, **wide)
    pad_sums = torch.empty(call.groups * call.tiles, num_heads, 2, block, **wide)
    _launch(call, grad_out, grad_qkv, bias_sums, pad_sums)
    if bias_table is not None:
        sizes = {"HEADS": num_heads, "WH": window_h, "WW": window_w, "EDGE": edge}
        sizes |= {"groups": call.groups, "BLOCK": _triton.power_of_two(edge), "ROWS": ROWS}
        programs = num_heads * -(-bias_table.shape[0] // ROWS)
        tables: dict[str, Any] = {"bias_sums": bias_sums, "grad_table": grad_table}
        _triton.launch(_sum_bias, programs, call.problem, **tables, **sizes)
    if pad_qkv is not None:  # the query of a padding token is cropped: its gradient stays zero
        sums = pad_sums.sum(0)[..., : call.arguments["D"]]  # [heads, 2, D]
        grad_pad[pad_qkv.numel() // 3 :] = sums.transpose(0, 1).reshape(-1)
    return grad_qkv, grad_table, grad_pad


def _launch(
    call: Call, grad_out: Tensor, grad_qkv: Tensor, bias_sums: Tensor, pad_sums: Tensor
) -> None:
    """Everything but the sums over groups."""
    names = ("grad_stride_b", "grad_stride_y", "grad_stride_x")
    arguments = call.arguments | dict(zip(names, grad_out.stride(), strict=False))
    arguments |= {"grad_out": grad_out}
    heads, tiles = arguments["HEADS"], call.tiles

    def launch(kernel: Any, programs: int, **outputs: Tensor) -> None:
        _triton.launch(kernel, programs, call.problem, **arguments, **outputs)

    programs = call.groups * tiles * heads
    if tiles == 1:
        launch(_backward, programs, grad_qkv=grad_qkv, bias_sums=bias_sums, pad_sums=pad_sums)
        return
    rows = (arguments["windows"] * heads, 2, tiles * call.tile)
    statistics = torch.empty(rows, dtype=torch.float32, device=grad_qkv.device)
    launch(_backward_rows, programs, grad_qkv=grad_qkv, statistics=statistics)
    launch(_backward_columns, programs, grad_qkv=grad_qkv, statistics=statistics, pad_sums=pad_sums)
    if arguments["HAS_BIAS"]:
        launch(_backward_bias, programs * tiles, statistics=statistics, bias_sums=bias_sums)


register_triton("ipsa_bwd", ipsa_bwd)
