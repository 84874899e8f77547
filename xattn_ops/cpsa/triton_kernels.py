"""Cross-patch self-attention in Triton.

The absorbed form, which this file has, serves one head without dropout and patches of up to 64
pixels. With A = Wq^T Wk, a = bq Wk, B = Wv^T Wo^T, b = bv Wo^T + bo, the tokens X [T, P] of a
channel give softmax(s (X A + a) X^T) X B + b: keys and values are X itself, and bk cancels. A
single token's softmax is 1. `triton_direct` has the rest.

Channels are dense in memory and tokens are not. So a program takes several channels of a map:
loads are as wide as these, and products are batched over them, a matrix to a warp. Channels of few
tokens share one matrix of 16 rows, of which the blocks of different channels are masked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._registration import register_triton
from .._triton import LOG2E, dot
from . import triton_direct
from .triton_planes import Patches, is_wide, pixels_of, problem, strides

LARGEST_PATCH = 64  # pixels; A and B then stay on the chip
ROWS = 16  # of a matrix of few tokens: as many as a matrix instruction takes
PROGRAMS = 1024  # about as many as fill a large card twice


@triton.jit
def square(pointer, BP: tl.constexpr):
    """A weight [BP, BP]."""
    p = tl.arange(0, BP)
    return tl.load(pointer + p[:, None] * BP + p[None, :])


@triton.jit
def weight(pointer, P: tl.constexpr, BP: tl.constexpr):
    """A weight [P, P], filled up with zeros to [BP, BP]."""
    p = tl.arange(0, BP)
    there = (p < P)[:, None] & (p < P)[None, :]
    return tl.load(pointer + p[:, None] * P + p[None, :], mask=there, other=0.0)


@triton.jit
def bias(pointer, P: tl.constexpr, BP: tl.constexpr, THERE: tl.constexpr):
    """A bias [P] in float32, filled up with zeros to [BP]; zeros where it is None."""
    p = tl.arange(0, BP)
    return tl.load(pointer + p, mask=(p < P) & THERE, other=0.0).to(tl.float32)


@triton.jit
def _absorb(
    qkv_weight, qkv_bias, proj_weight, proj_bias, query, query_bias, result, result_bias,
    P: tl.constexpr, BP: tl.constexpr, HAS_QKV_BIAS: tl.constexpr, HAS_PROJ_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """query = A, query_bias = a, result = B [BP, BP], result_bias = b [BP]; grid: A, B."""
    p = tl.arange(0, BP)
    at = p[:, None] * BP + p[None, :]
    if tl.program_id(0) == 0:
        wq = weight(qkv_weight, P, BP)
        wk = weight(qkv_weight + P * P, P, BP)
        bq = bias(qkv_bias, P, BP, HAS_QKV_BIAS)
        tl.store(query + at, dot(tl.trans(wq), wk, PRECISION).to(query.dtype.element_ty))
        tl.store(query_bias + p, tl.sum(bq[:, None] * wk, 0))
    else:
        wv = weight(qkv_weight + 2 * P * P, P, BP)
        wo = weight(proj_weight, P, BP)
        bv = bias(qkv_bias + 2 * P, P, BP, HAS_QKV_BIAS)
        bo = bias(proj_bias, P, BP, HAS_PROJ_BIAS)
        product = dot(tl.trans(wv), tl.trans(wo), PRECISION)
        tl.store(result + at, product.to(result.dtype.element_ty))
        tl.store(result_bias + p, tl.sum(bv[None, :] * wo, 1) + bo)


@triton.jit
def _linear(rows, matrix, PRECISION: tl.constexpr):
    """rows [n, r, k] times matrix [k, o], in float32."""
    flat = rows.reshape(rows.shape[0] * rows.shape[1], rows.shape[2])
    return dot(flat, matrix, PRECISION).reshape(rows.shape[0], rows.shape[1], matrix.shape[1])


@triton.jit
def _forward(
    x, query, query_bias, result, result_bias, out, stride_b, stride_y, stride_x, H, W, C, T,
    patches_x, groups, query_tiles, key_tiles, per_program, scale,
    PH: tl.constexpr, PW: tl.constexpr, BP: tl.constexpr, CB: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, MATRICES: tl.constexpr, ATTENDS: tl.constexpr, PADDED: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [B, H, W, C] of per_program tiles of queries; grid: groups of channels x runs of tiles x
    images. A tile [CB, BQ, BP] is MATRICES matrices, one a channel or one for several."""
    ROWS: tl.constexpr = CB * BQ // MATRICES
    KEYS: tl.constexpr = CB * BK // MATRICES
    c = tl.program_id(0) % groups * CB + tl.arange(0, CB)
    runs = tl.cdiv(query_tiles, per_program)
    first = tl.program_id(0) // groups % runs * per_program
    image = (tl.program_id(0) // groups // runs).to(tl.int64)
    p = tl.arange(0, BP)
    q, k = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
    if ATTENDS:
        to_query = square(query, BP)
        shift = tl.load(query_bias + p)
    to_result = square(result, BP)
    offset = tl.load(result_bias + p)
    for step in range(min(per_program, query_tiles - first)):
        tq = (first + step) * BQ + tl.arange(0, BQ)
        pixels, inside = pixels_of(
            x, image, c, tq, stride_b, stride_y, stride_x, H, W, C, T, patches_x,
            PH, PW, BP, PADDED, RAGGED, WIDE,
        )  # fmt: skip
        z = tl.load(pixels, mask=inside, other=0.0).reshape(MATRICES, ROWS, BP)
        if ATTENDS:
            y = (_linear(z, to_query, PRECISION) + shift[None, None, :]).to(z.dtype)
            highest = tl.full((MATRICES, ROWS), float("-inf"), tl.float32)
            total = tl.zeros((MATRICES, ROWS), tl.float32)
            sums = tl.zeros((MATRICES, ROWS, BP), tl.float32)
            for tile in range(key_tiles):
                pixels_k, inside_k = pixels_of(
                    x, image, c, tile * BK + tl.arange(0, BK), stride_b, stride_y, stride_x, H, W,
                    C, T, patches_x, PH, PW, BP, PADDED, RAGGED, WIDE,
                )  # fmt: skip
                keys = tl.load(pixels_k, mask=inside_k, other=0.0).reshape(MATRICES, KEYS, BP)
                s = dot(y, keys.permute(0, 2, 1), PRECISION) * (scale * LOG2E)
                seen = (q // BQ == k // BK) | (CB == MATRICES)
                seen &= tile * BK + k % BK < T
                if CB > MATRICES:  # what is not finite stays in its channel: 0 times NaN is NaN
                    finite = tl.abs(keys.to(tl.float32)) < float("inf")
                    keys = tl.where(finite, keys, 0.0)
                    finite = tl.min(finite.to(tl.int32), 2)
                    s = tl.where(finite[:, None, :] == 1, s, float("nan"))
                s = tl.where(seen[None], s, float("-inf"))
                above = tl.maximum(highest, tl.max(s, 2))
                e = tl.exp2(s - above[:, :, None])
                before = tl.exp2(highest - above)
                total = total * before + tl.sum(e, 2)
                sums = sums * before[:, :, None] + dot(e.to(z.dtype), keys, PRECISION)
                highest = above
            z = (sums / total[:, :, None]).to(z.dtype)
        o = _linear(z, to_result, PRECISION) + offset[None, None, :]
        to, inside = pixels_of(
            out, image, c, tq, H * W * C, W * C, C, H, W, C, T, patches_x,
            PH, PW, BP, PADDED, RAGGED, WIDE,
        )  # fmt: skip
        tl.store(to, o.to(z.dtype).reshape(CB, BQ, BP), mask=inside)


class Tile(NamedTuple):
    """What a program takes at a time: tokens of some channels, as `matrices` matrices."""

    channels: int
    queries: int
    keys: int
    matrices: int


def tile(tokens: int, dtype: torch.dtype) -> Tile:
    """Channels of 16 bytes, times as many as share a matrix."""
    matrices = 16 // dtype.itemsize
    if tokens > ROWS:
        return Tile(matrices, 32 if dtype.itemsize == 2 else 16, 16, matrices)
    slots = triton.next_power_of_2(tokens)  # of a channel
    return Tile(matrices * ROWS // slots, slots, slots, matrices)


def absorbs(patches: Patches, num_heads: int, dropout_p: float) -> bool:
    """Whether a call takes the absorbed form."""
    one_head = num_heads == 1 or patches.tokens == 1
    return one_head and dropout_p == 0 and patches.pixels <= LARGEST_PATCH


def absorbed(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    patches: Patches,
) -> dict[str, Any]:
    """A, a, B and b by the names of the kernels' parameters; filled up with zeros."""
    BP = _triton.power_of_two(patches.pixels)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    result: dict[str, Any] = {"query": x.new_empty(BP, BP), "result": x.new_empty(BP, BP)}
    result |= {name: torch.empty(BP, **wide) for name in ("query_bias", "result_bias")}
    weights = weight_arguments(qkv_weight, qkv_bias, proj_weight, proj_bias)
    sizes = {"P": patches.pixels, "BP": BP}
    _triton.launch(_absorb, 2, problem(patches, x), **sizes, **weights, **result)
    return result


def weight_arguments(
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
) -> dict[str, Any]:
    """The weights as they came, by the names of the kernels' parameters."""
    absent = qkv_weight  # a pointer that no kernel follows
    return {
        "qkv_weight": qkv_weight.contiguous(),
        "qkv_bias": absent if qkv_bias is None else qkv_bias.contiguous(),
        "proj_weight": proj_weight.contiguous(),
        "proj_bias": absent if proj_bias is None else proj_bias.contiguous(),
        "HAS_QKV_BIAS": qkv_bias is not None,
        "HAS_PROJ_BIAS": proj_bias is not None,
        "PRECISION": _triton.precision(qkv_weight.dtype),
    }


def cpsa_fwd(
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
) -> Tensor:
    """out [B, H, W, C]; the arguments are those of the native op of this name."""
    x = _triton.dense(x)
    patches = Patches(patch_h, patch_w, *x.shape)
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    if not x.numel():
        return x.new_empty(x.shape)
    if not absorbs(patches, num_heads, dropout_p):
        return triton_direct.forward(x, weights, seed, patches, num_heads, scale, dropout_p)
    out = x.new_empty(x.shape)
    cut = tile(patches.tokens, x.dtype)
    groups = -(-patches.C // cut.channels)
    query_tiles, key_tiles = -(-patches.tokens // cut.queries), -(-patches.tokens // cut.keys)
    tiles = groups * query_tiles * patches.B
    per_program = min(query_tiles, max(1, tiles // PROGRAMS))
    arguments = patches.arguments() | strides(x) | absorbed(x, *weights, patches)
    arguments |= {"groups": groups, "query_tiles": query_tiles, "key_tiles": key_tiles}
    arguments |= {"per_program": per_program, "scale": scale, "ATTENDS": patches.tokens > 1}
    arguments |= {"CB": cut.channels, "BQ": cut.queries, "BK": cut.keys, "MATRICES": cut.matrices}
    arguments |= {"RAGGED": patches.C % cut.channels > 0, "WIDE": is_wide(patches, x)}
    arguments |= {"PRECISION": _triton.precision(x.dtype)}
    programs = groups * -(-query_tiles // per_program) * patches.B
    _triton.launch(_forward, programs, problem(patches, x), x=x, out=out, **arguments)
    return out


register_triton("cpsa_fwd", cpsa_fwd)
