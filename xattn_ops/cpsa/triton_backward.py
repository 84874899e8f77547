"""The gradients of cross-patch self-attention in Triton.

The absorbed form, for up to 64 tokens of a channel; `triton_direct` has the rest. With Y = X A + a,
W the softmax of s Y X^T, dO the gradient of the result:
  dZ = dO B^T           dW = dZ X^T      dS = s W (dW - rowsum(W dW))     dY = dS X      U = W^T dO
  dX = dS^T Y + dY A^T + U B^T           dA = X^T dY   da = sum dY        dB = X^T U     db = sum dO
and the gradients of the four weights follow from dA, da, dB, db. Of a single token W is 1.

Up to 8 tokens are taken from the map, as one matrix of 32 rows; up to 16 as in the forward, a
matrix a warp, where the registers of the architecture hold it. More, or elsewhere, they are copied
into rows first, from which all warps take one matrix, of as many rows as `_tiles` says. float32 has
matrix instructions only as tf32; without them these kernels would live in local memory, and the
direct form serves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._registration import register_triton
from .._triton import LOG2E, dot
from . import triton_direct
from .triton_kernels import ROWS, absorbed, absorbs, bias, square, tile, weight, weight_arguments
from .triton_planes import (
    Patches,
    is_wide,
    per_row,
    pixels_of,
    problem,
    strides,
    to_map,
    to_planes,
    transposed,
)

FEW_ROWS = 32  # of the matrix that channels of few tokens share; more would spill on sm_80
PROGRAMS = 512  # each stores a share of the gradients of A and B


@triton.jit
def _flat(rows):
    """The rows of all matrices."""
    if len(rows.shape) == 2:
        return rows
    else:
        return rows.reshape(rows.shape[0] * rows.shape[1], rows.shape[2])


@triton.jit
def _matrices(tile, MATRICES: tl.constexpr):
    """A tile [channels, tokens, pixels] as matrices [MATRICES, rows, pixels], or as one matrix."""
    if MATRICES == 1:
        return tile.reshape(tile.shape[0] * tile.shape[1], tile.shape[2])
    else:
        rows: tl.constexpr = tile.shape[0] * tile.shape[1] // MATRICES
        return tile.reshape(MATRICES, rows, tile.shape[2])


@triton.jit
def _add_rows(sums, rows, PRECISION: tl.constexpr):
    """sums [16, columns], each row the same, plus the sum of the rows of all matrices.

    In the short formats it is a product: the sums of a reduction would stay in all threads.
    """
    flat = _flat(rows)
    if flat.dtype == tl.float32:
        return sums + tl.sum(flat, 0)[None, :]
    else:
        ones = tl.full((16, flat.shape[0]), 1.0, tl.float32).to(flat.dtype)
        return sums + dot(ones, flat, PRECISION)


@triton.jit
def _store_sums(to, matrix, row, BP: tl.constexpr):
    """[BP + 1, BP]: the gradient of a matrix and that of its bias."""
    p = tl.arange(0, BP)
    tl.store(to + p[:, None] * BP + p[None, :], matrix)
    tl.store(to + BP * BP + p, tl.max(row, 0))


@triton.jit
def _backward(
    grad_out, x, query, query_bias, result, grad_x, sums,
    grad_stride_b, grad_stride_y, grad_stride_x,
    stride_b, stride_y, stride_x, H, W, C, T, patches_x, groups, items, per_program, scale,
    PH: tl.constexpr, PW: tl.constexpr, BP: tl.constexpr, CB: tl.constexpr, BT: tl.constexpr,
    SLOTS: tl.constexpr, MATRICES: tl.constexpr, PLANES: tl.constexpr, ATTENDS: tl.constexpr,
    PADDED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_x of per_program items, and sums [programs, 2, BP + 1, BP], this program's share of dB,
    db, dA, da (the latter two only where it ATTENDS).

    An item is a tile [CB, BT, BP] of a map as MATRICES matrices, or with PLANES the tokens of CB
    channels of an image as one matrix of BT of the rows [N, BP]. A channel has SLOTS rows of a
    matrix.
    """
    TOKENS: tl.constexpr = BT if PLANES else CB * BT // MATRICES
    p = tl.arange(0, BP)
    q, k = tl.arange(0, TOKENS)[:, None], tl.arange(0, TOKENS)[None, :]
    seen = (q // SLOTS == k // SLOTS) & (k % SLOTS < T)
    d_query, d_result = tl.zeros((BP, BP), tl.float32), tl.zeros((BP, BP), tl.float32)
    da, db = tl.zeros((16, BP), tl.float32), tl.zeros((16, BP), tl.float32)
    first = tl.program_id(0) * per_program
    # Constants of the loop, left in front of it, would fill the registers.
    for step in tl.range(min(per_program, items - first), disable_licm=True):
        item = first + step
        if PLANES:
            r = tl.arange(0, BT)
            row = (item // groups).to(tl.int64) * C + item % groups * CB
            inside = (r < min(CB, C - item % groups * CB) * SLOTS)[:, None]
            place = row * (SLOTS * BP) + (r[:, None] * BP + p[None, :])
            do = tl.load(grad_out + place, mask=inside, other=0.0)
            z = tl.load(x + place, mask=inside, other=0.0)
        else:
            c = item % groups * CB + tl.arange(0, CB)
            image = (item // groups).to(tl.int64)
            t = tl.arange(0, BT)
            pixels, inside = pixels_of(
                grad_out, image, c, t, grad_stride_b, grad_stride_y, grad_stride_x, H, W, C, T,
                patches_x, PH, PW, BP, PADDED, RAGGED, WIDE,
            )  # fmt: skip
            do = _matrices(tl.load(pixels, mask=inside, other=0.0), MATRICES)
            pixels, inside = pixels_of(
                x, image, c, t, stride_b, stride_y, stride_x, H, W, C, T, patches_x,
                PH, PW, BP, PADDED, RAGGED, WIDE,
            )  # fmt: skip
            z = _matrices(tl.load(pixels, mask=inside, other=0.0), MATRICES)
        to_result = square(result, BP)
        u = do
        if ATTENDS:
            to_query, shift = square(query, BP), tl.load(query_bias + p)
            y = (dot(_flat(z), to_query, PRECISION) + shift[None, :]).to(z.dtype).reshape(z.shape)
            s = dot(y, transposed(z), PRECISION) * scale
            s = tl.where(seen if MATRICES == 1 else seen[None], s, float("-inf"))
            e = tl.exp2((s - per_row(tl.max(s, -1))) * LOG2E)
            w = e / per_row(tl.sum(e, -1))
            dz = dot(_flat(do), tl.trans(to_result), PRECISION).to(z.dtype).reshape(z.shape)
            dw = dot(dz, transposed(z), PRECISION)
            ds = (w * (dw - per_row(tl.sum(w * dw, -1))) * scale).to(z.dtype)
            u = dot(transposed(w.to(z.dtype)), do, PRECISION).to(z.dtype)
            dy = dot(ds, z, PRECISION).to(z.dtype)
            d_query += dot(tl.trans(_flat(z)), _flat(dy), PRECISION)
            da = _add_rows(da, dy, PRECISION)
        d_result += dot(tl.trans(_flat(z)), _flat(u), PRECISION)
        db = _add_rows(db, do, PRECISION)
        dx = dot(_flat(u), tl.trans(to_result), PRECISION)
        if ATTENDS:
            dx += dot(_flat(dy), tl.trans(to_query), PRECISION)
            dx = dx.reshape(z.shape) + dot(transposed(ds), y, PRECISION)
        if PLANES:
            tl.store(grad_x + place, dx.to(z.dtype), mask=inside)
        else:
            pixels, inside = pixels_of(
                grad_x, image, c, t, H * W * C, W * C, C, H, W, C, T, patches_x,
                PH, PW, BP, PADDED, RAGGED, WIDE,
            )  # fmt: skip
            tl.store(pixels, dx.to(z.dtype).reshape(CB, BT, BP), mask=inside)
    share = sums + tl.program_id(0).to(tl.int64) * (2 * (BP + 1) * BP)
    _store_sums(share, d_result, db, BP)
    _store_sums(share + (BP + 1) * BP, d_query, da, BP)


@triton.jit
def _store_gradient(pointer, gradient, P: tl.constexpr, BP: tl.constexpr):
    """A weight's gradient [P, P] from [BP, BP]."""
    p = tl.arange(0, BP)
    there = (p < P)[:, None] & (p < P)[None, :]
    to = pointer + p[:, None] * P + p[None, :]
    tl.store(to, gradient.to(pointer.dtype.element_ty), mask=there)


@triton.jit
def _chain(
    sums, qkv_weight, qkv_bias, proj_weight, proj_bias,
    grad_qkv_weight, grad_qkv_bias, grad_proj_weight, grad_proj_bias,
    P: tl.constexpr, BP: tl.constexpr, HAS_QKV_BIAS: tl.constexpr, HAS_PROJ_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the weights from sums [2, BP + 1, BP] = dB, db, dA, da; grid: q, k, v, o.

    dWq = Wk dA^T, dbq = Wk da, dWk = Wq dA + bq da^T, dbk = 0, dWv = Wo^T dB^T, dbv = Wo^T db,
    dWo = dB^T Wv^T + db bv^T, dbo = db.
    """
    which = tl.program_id(0)
    p = tl.arange(0, BP)
    half = sums + (which < 2).to(tl.int32) * (BP + 1) * BP
    matrix, row = square(half, BP), tl.load(half + BP * BP + p)
    kind: tl.constexpr = qkv_bias.dtype.element_ty
    if which == 0:
        wk = weight(qkv_weight + P * P, P, BP).to(tl.float32)
        _store_gradient(grad_qkv_weight, dot(wk, tl.trans(matrix), PRECISION), P, BP)
        if HAS_QKV_BIAS:
            tl.store(grad_qkv_bias + p, tl.sum(wk * row[None, :], 1).to(kind), mask=p < P)
    elif which == 1:
        wq = weight(qkv_weight, P, BP).to(tl.float32)
        bq = bias(qkv_bias, P, BP, HAS_QKV_BIAS)
        gradient = dot(wq, matrix, PRECISION) + bq[:, None] * row[None, :]
        _store_gradient(grad_qkv_weight + P * P, gradient, P, BP)
        if HAS_QKV_BIAS:
            tl.store(grad_qkv_bias + P + p, tl.zeros((BP,), kind), mask=p < P)
    elif which == 2:
        wo = weight(proj_weight, P, BP).to(tl.float32)
        gradient = dot(tl.trans(wo), tl.trans(matrix), PRECISION)
        _store_gradient(grad_qkv_weight + 2 * P * P, gradient, P, BP)
        if HAS_QKV_BIAS:
            gradient_bias = tl.sum(wo * row[:, None], 0)
            tl.store(grad_qkv_bias + 2 * P + p, gradient_bias.to(kind), mask=p < P)
    else:
        wv = weight(qkv_weight + 2 * P * P, P, BP).to(tl.float32)
        bv = bias(qkv_bias + 2 * P, P, BP, HAS_QKV_BIAS)
        gradient = dot(tl.trans(matrix), tl.trans(wv), PRECISION) + row[:, None] * bv[None, :]
        _store_gradient(grad_proj_weight, gradient, P, BP)
        if HAS_PROJ_BIAS:
            tl.store(grad_proj_bias + p, row.to(kind), mask=p < P)


class Cut(NamedTuple):
    """How the tokens are cut into items, by the names of the kernel's parameters."""

    CB: int  # channels of an item
    BT: int
    SLOTS: int
    MATRICES: int
    PLANES: bool


def _cut(patches: Patches, x: Tensor) -> Cut | None:
    """None where `triton_direct` is to serve."""
    tokens, dtype = patches.tokens, x.dtype
    short = dtype.itemsize == 2
    edge = _triton.shape(problem(patches, x), "backward", x.device).edge
    multiplies = short or _triton.precision(dtype) == "tf32"
    if tokens > edge or not (multiplies or tokens == 1):
        return None
    of = tile(tokens, dtype)
    if tokens <= ROWS // 2 or (tokens <= ROWS and not short):
        return Cut(FEW_ROWS // of.queries, of.queries, of.queries, 1, False)
    if edge == ROWS:
        return Cut(of.channels, ROWS, ROWS, of.matrices, False)
    return Cut(edge // tokens, edge, tokens, 1, True)


def _absorbed(
    grad_out: Tensor, x: Tensor, forms: dict[str, Tensor], patches: Patches, scale: float, cut: Cut
) -> tuple[Tensor, Tensor]:
    """grad_x, and [2, BP + 1, BP]: dB, db, dA, da."""
    groups = -(-patches.C // cut.CB)
    items = patches.B * groups
    per_program = -(-items // PROGRAMS)
    programs = -(-items // per_program)
    arguments = patches.arguments() | cut._asdict() | forms
    arguments |= strides(x) | strides(grad_out, "grad_") | {"WIDE": is_wide(patches, x, grad_out)}
    arguments |= {"groups": groups, "items": items, "per_program": per_program, "scale": scale}
    arguments |= {"RAGGED": patches.C % cut.CB > 0, "ATTENDS": patches.tokens > 1}
    arguments |= {"PRECISION": _triton.precision(x.dtype)}
    BP = arguments["BP"]
    sums = torch.empty(programs, 2, BP + 1, BP, dtype=torch.float32, device=x.device)
    if cut.PLANES:
        x, grad_out = to_planes(x, patches, BP), to_planes(grad_out, patches, BP)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    arguments |= {"x": x, "grad_out": grad_out, "grad_x": grad_x, "sums": sums}
    _triton.launch(_backward, programs, problem(patches, x), **arguments)
    return to_map(grad_x, patches) if cut.PLANES else grad_x, sums.sum(0)


def cpsa_bwd(
    grad_out: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    seed: Tensor | None,
    patch_h: int,
    patch_w: int,
    num_heads: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the weights and the biases (empty where the argument is None)."""
    grad_out, x = _triton.dense(grad_out), _triton.dense(x)
    patches = Patches(patch_h, patch_w, *x.shape)
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    cut = _cut(patches, x) if absorbs(patches, num_heads, dropout_p) else None
    if x.numel() and cut is None:
        return triton_direct.backward(
            grad_out, x, weights, seed, patches, num_heads, scale, dropout_p
        )
    names = ("grad_qkv_weight", "grad_qkv_bias", "grad_proj_weight", "grad_proj_bias")
    sizes = (torch.Size([0]) if w is None else w.shape for w in weights)
    grads = {name: x.new_zeros(size) for name, size in zip(names, sizes, strict=True)}
    grad_x = x.new_empty(x.shape)
    if x.numel() and cut is not None:
        forms = absorbed(x, *weights, patches)
        del forms["result_bias"]
        grad_x, sums = _absorbed(grad_out, x, forms, patches, scale, cut)
        arguments = weight_arguments(*weights) | grads
        arguments |= {"P": patches.pixels, "BP": _triton.power_of_two(patches.pixels), "sums": sums}
        _triton.launch(_chain, 4, problem(patches, x), **arguments)
    grad_qkv_weight, grad_qkv_bias, grad_proj_weight, grad_proj_bias = grads.values()
    return grad_x, grad_qkv_weight, grad_qkv_bias, grad_proj_weight, grad_proj_bias


register_triton("cpsa_bwd", cpsa_bwd)
