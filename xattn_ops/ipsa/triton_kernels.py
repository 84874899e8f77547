"""Inner-patch self-attention in Triton.

A program takes one head and one tile of queries through a run of windows, so that what belongs to
the head (the bias, the gradient of the bias) stays in registers. Tokens are addressed in the map:
shift, padding and window are arithmetic on their rows and columns. A window of at most 64 tokens
is one tile; larger windows loop over tiles of 64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tiles, _triton
from .._registration import register_triton
from .._triton import LOG2E, dot, keep_weights

ROWS = 16  # of the bias, or of its bins, that a program expands or sums
PROGRAMS = 1024  # about as many as fill a large card twice


@triton.jit
def _place(
    window, t, H, W, windows_y, windows_x, shift_y, shift_x,
    WH: tl.constexpr, WW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where the tokens t of a window stand: image, row, column; the region that they came from;
    which of them are in the image, and which are padding."""
    image = (window // (windows_y * windows_x)).to(tl.int64)
    place = window % (windows_y * windows_x)
    y = place // windows_x * WH + t // WW + shift_y
    x = place % windows_x * WW + t % WW + shift_x
    around_y, around_x = y >= windows_y * WH, x >= windows_x * WW  # rolled around the edge
    y = tl.where(around_y, y - windows_y * WH, y)
    x = tl.where(around_x, x - windows_x * WW, x)
    token = t < WH * WW
    inside = token & (y < H) & (x < W)
    region = 2 * around_y.to(tl.int32) + around_x.to(tl.int32)
    if WIDE:  # one image has offsets beyond 32 bits
        y, x = y.to(tl.int64), x.to(tl.int64)
    return image, y, x, region, inside, token & ~inside


@triton.jit
def _rows(pointer, y, x, stride_y, stride_x, d):
    """Pointers to the rows [t, d] of the pixels (y, x)."""
    return pointer + (y * stride_y + x * stride_x)[:, None] + d[None, :]


@triton.jit
def _load(pointers, inside, padding, pad, d, D: tl.constexpr, HAS_PAD: tl.constexpr):
    """Rows [t, d] of q, k or v; those of padding tokens are `pad` [D], or zeros."""
    rows = tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    if HAS_PAD:
        row = tl.load(pad + d, mask=d < D, other=0.0)
        rows = tl.where(padding[:, None], row[None, :], rows)
    return rows


@triton.jit
def _expand_bias(
    table, bias, HEADS: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, EDGE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """bias [heads, EDGE, EDGE] = the bias of query and key times log2(e), -inf for keys beyond the
    window; a program takes a head and ROWS queries. A few KB, so that the windows need no index."""
    tiles: tl.constexpr = EDGE // ROWS
    head = tl.program_id(0) // tiles
    tq = (tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS))[:, None]
    tk = tl.arange(0, BLOCK)[None, :]
    dy, dx = tq // WW - tk // WW + WH - 1, tq % WW - tk % WW + WW - 1
    both = (tk < WH * WW) & (tq < WH * WW)
    tile = tl.load(table + (dy * (2 * WW - 1) + dx) * HEADS + head, mask=both, other=0.0)
    tile = tl.where(tk < WH * WW, tile.to(tl.float32) * LOG2E, float("-inf"))
    tl.store(bias + (head * EDGE + tq) * EDGE + tk, tile, mask=tk < EDGE)


@triton.jit
def _bias(bias, head, tq, tk, TOKENS: tl.constexpr, EDGE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """A tile of the expanded bias; without one, -inf for keys beyond the window."""
    if HAS_BIAS:
        return tl.load(bias + head * EDGE * EDGE + tq[:, None] * EDGE + tk[None, :])
    return tl.where((tk < TOKENS)[None, :] & (tq >= 0)[:, None], 0.0, float("-inf"))


@triton.jit
def _scores(
    q,
    k,
    bias,
    tq,
    region_q,
    region_k,
    scale,
    TOKENS: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits times log2(e); -inf between tokens of different regions."""
    s = dot(q, tl.trans(k), PRECISION) * (scale * LOG2E) + bias
    if SHIFTED:  # rows beyond the window see everything, lest they be empty
        together = (region_q[:, None] == region_k[None, :]) | (tq >= TOKENS)[:, None]
        s = tl.where(together, s, float("-inf"))
    return s


@triton.jit
def _forward(
    qkv, bias, pad, seed, out, stride_b, stride_y, stride_x, H, W, windows, windows_y, windows_x,
    shift_y, shift_x, per_program, scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    BT: tl.constexpr, TILES: tl.constexpr, SHIFTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_PAD: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [B, H, W, C] of per_program windows; grid: groups of windows x query tiles x heads."""
    C: tl.constexpr = HEADS * D
    head = tl.program_id(0) % HEADS
    query_tile = tl.program_id(0) // HEADS % TILES
    first = tl.program_id(0) // (HEADS * TILES) * per_program
    d, t = tl.arange(0, BD), tl.arange(0, BT)
    tq = query_tile * BT + t
    if TILES == 1:
        tile_bias = _bias(bias, head, tq, t, WH * WW, TILES * BT, HAS_BIAS)
    qkv += head * D
    pad += head * D
    for step in range(min(per_program, windows - first)):
        window = first + step
        image, y, x, region_q, inside_q, padding_q = _place(
            window, tq, H, W, windows_y, windows_x, shift_y, shift_x, WH, WW, WIDE
        )
        base = qkv + image * stride_b
        rows = _rows(base, y, x, stride_y, stride_x, d)
        q = _load(rows, inside_q, padding_q, pad, d, D, HAS_PAD)
        to = _rows(out + image * H * W * C + head * D, y, x, W * C, C, d)
        highest = tl.full((BT,), float("-inf"), tl.float32)
        total = tl.zeros((BT,), tl.float32)
        sums = tl.zeros((BT, BD), tl.float32)
        for tile in range(TILES):
            tk = tile * BT + t
            if TILES > 1:
                tile_bias = _bias(bias, head, tq, tk, WH * WW, TILES * BT, HAS_BIAS)
            image, y, x, region, inside, padding = _place(
                window, tk, H, W, windows_y, windows_x, shift_y, shift_x, WH, WW, WIDE
            )
            rows = _rows(base, y, x, stride_y, stride_x, d)
            k = _load(rows + C, inside, padding, pad + C, d, D, HAS_PAD)
            v = _load(rows + 2 * C, inside, padding, pad + 2 * C, d, D, HAS_PAD)
            s = _scores(q, k, tile_bias, tq, region_q, region, scale, WH * WW, SHIFTED, PRECISION)
            above = tl.maximum(highest, tl.max(s, 1))
            level = tl.where(above == float("-inf"), 0.0, above)  # a tile of strangers
            e = tl.exp2(s - level[:, None])
            before = tl.exp2(highest - level)
            total = total * before + tl.sum(e, 1)
            if DROPOUT:
                unit = window.to(tl.int64) * HEADS + head
                blocks = query_tile * (BT // 4) + tl.arange(0, BT // 4)
                e *= keep_weights(seed, unit, blocks, tk, WH * WW, threshold, keep_scale)
            sums = sums * before[:, None] + dot(e.to(v.dtype), v, PRECISION)
            highest = above
        o = (sums / total[:, None]).to(out.dtype.element_ty)
        tl.store(to, o, mask=inside_q[:, None] & (d < D)[None, :])


class Call(NamedTuple):
    """What every kernel of one call takes, by the names of its parameters."""

    problem: _tiles.Problem
    arguments: dict[str, Any]
    groups: int  # runs of windows
    tiles: int
    tile: int


def plan(
    qkv: Tensor,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    dropout_p: float,
    kernel: str,
) -> Call:
    """The sizes, and how the windows are cut into runs: by their number alone, never by the card,
    so that sums come out the same everywhere."""
    (B, H, W, C3), (wh, ww) = qkv.shape, window
    head_dim, tokens = C3 // 3 // num_heads, wh * ww
    windows_y, windows_x = -(-H // wh), -(-W // ww)
    windows = B * windows_y * windows_x
    forms = {"shifted": any(shift), "padded": pad_qkv is not None}
    form = "+".join(name for name, there in forms.items() if there)
    problem = _tiles.Problem("ipsa", head_dim, tokens, qkv.dtype, form)
    edge = _triton.shape(problem, kernel, qkv.device).edge
    tile = min(edge, _triton.power_of_two(tokens))
    tiles = -(-tokens // tile)
    runs = max(1, min(windows // 4, PROGRAMS // (num_heads * tiles)))
    per_program = -(-windows // runs) if windows else 1
    absent = qkv  # a pointer that no kernel follows
    arguments = {
        "qkv": qkv,
        "bias": absent
        if bias_table is None
        else _expanded(bias_table, num_heads, window, tiles * tile, problem),
        "pad": absent if pad_qkv is None else pad_qkv.contiguous(),
        "seed": absent if seed is None else seed,
        **dict(zip(("stride_b", "stride_y", "stride_x"), qkv.stride(), strict=False)),
        **{"H": H, "W": W, "windows": windows, "windows_y": windows_y, "windows_x": windows_x},
        **{"shift_y": shift[0], "shift_x": shift[1], "per_program": per_program, "scale": scale},
        **{"HEADS": num_heads, "D": head_dim, "BD": _triton.power_of_two(head_dim)},
        "WIDE": H * max(qkv.stride(1), W * C3) >= 2**31,
        **{"WH": wh, "WW": ww, "BT": tile, "TILES": tiles, "SHIFTED": any(shift)},
        **{"HAS_BIAS": bias_table is not None, "HAS_PAD": pad_qkv is not None},
        "PRECISION": _triton.precision(qkv.dtype),
        **_triton.dropout_options(dropout_p),
    }
    return Call(problem, arguments, -(-windows // per_program), tiles, tile)


def _expanded(
    table: Tensor, num_heads: int, window: tuple[int, int], edge: int, problem: _tiles.Problem
) -> Tensor:
    bias = torch.empty(num_heads, edge, edge, dtype=torch.float32, device=table.device)
    sizes = {"HEADS": num_heads, "WH": window[0], "WW": window[1], "EDGE": edge}
    sizes |= {"BLOCK": _triton.power_of_two(edge), "ROWS": ROWS}
    programs = num_heads * edge // ROWS
    _triton.launch(_expand_bias, programs, problem, table=table.contiguous(), bias=bias, **sizes)
    return bias


def ipsa_fwd(
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
) -> Tensor:
    """out [B, H, W, C]; the arguments are those of the native op of this name."""
    qkv = _triton.dense(qkv)
    window, shift = (window_h, window_w), (shift_h, shift_w)
    options = (num_heads, window, shift, scale, dropout_p)
    call = plan(qkv, bias_table, pad_qkv, seed, *options, "forward")
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    if out.numel():
        programs = call.groups * call.tiles * num_heads
        _triton.launch(_forward, programs, call.problem, out=out, **call.arguments)
    return out


register_triton("ipsa_fwd", ipsa_fwd)
