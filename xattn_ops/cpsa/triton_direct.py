"""Cross-patch self-attention in Triton, direct form: several heads, dropout, patches of any size.

Tokens are copied into rows, the projections are matrix products of PyTorch, and the attention of
one head of one channel takes tiles of queries and keys as anywhere. Heads longer than 64 values
are taken 64 at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._triton import LOG2E, dot, keep_weights
from .triton_planes import Patches, per_row, problem, to_map, to_planes, transposed

LONGEST_HEAD = 64  # values of a head in registers at a time
FEW_TOKENS = 16  # up to which a matrix is one warp's, so that a program takes twice the tile's edge


@triton.jit
def _place(
    parts, tiles, T, units,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """What this program takes: M units (heads of channels, as dropout counts them) and where they
    begin in [N, 3P] and in [N, P], a tile, a part of the head. Grid: parts x tiles x units / M."""
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts % tiles
    first = (tl.program_id(0) // parts // tiles).to(tl.int64) * M
    unit = first + tl.arange(0, M)
    within = tl.minimum(unit, units - 1)
    row, head = within // HEADS * T, within % HEADS
    in_qkv = row * (3 * HEADS * D) + head * D
    in_rows = row * (HEADS * D) + head * D
    return unit, in_qkv, in_rows, tile, tile * BT + tl.arange(0, BT), part * BD + tl.arange(0, BD)


@triton.jit
def _rows(pointer, starts, t, d, stride, T, D: tl.constexpr):
    """The values d of the tokens t of heads that begin at starts [M], zeros beyond; [M, t, d], or
    [t, d] where M is 1."""
    pointers = pointer + starts[:, None, None] + (t[:, None] * stride + d[None, :])[None]
    there = (t < T)[:, None] & (d < D)[None, :]
    rows = tl.load(pointers, mask=there[None], other=0.0)
    if starts.shape[0] == 1:
        rows = rows.reshape(t.shape[0], d.shape[0])
    return rows


@triton.jit
def _store(
    pointer, starts, unit, units, t, d, stride, T, rows,
    D: tl.constexpr,
):  # fmt: skip
    pointers = pointer + starts[:, None, None] + (t[:, None] * stride + d[None, :])[None]
    there = (unit < units)[:, None, None] & ((t < T)[:, None] & (d < D)[None, :])[None]
    rows = rows.to(pointer.dtype.element_ty).reshape(unit.shape[0], t.shape[0], d.shape[0])
    tl.store(pointers, rows, mask=there)


@triton.jit
def _products(
    left, right, left_starts, right_starts, t, u, left_stride, right_stride, T,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of the tokens t of one matrix with the tokens u of another, over a head."""
    for part in tl.static_range((D + BD - 1) // BD):
        d = part * BD + tl.arange(0, BD)
        a = _rows(left, left_starts, t, d, left_stride, T, D)
        b = _rows(right, right_starts, u, d, right_stride, T, D)
        if part == 0:
            result = dot(a, transposed(b), PRECISION)
        else:
            result += dot(a, transposed(b), PRECISION)
    return result


@triton.jit
def _logits(
    qkv, starts, tq, tk, scale, T, P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """-inf for keys beyond the last."""
    s = _products(qkv, qkv + P, starts, starts, tq, tk, 3 * P, 3 * P, T, D, BD, PRECISION) * scale
    seen = (tk < T)[None, :] & (tq >= 0)[:, None]
    if starts.shape[0] > 1:
        seen = seen[None]
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _keep(
    weights, seed, unit, tile, tk, T, threshold, keep_scale,
    BT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The weights of a tile of queries times their dropout factors."""
    if DROPOUT:
        block = tl.arange(0, unit.shape[0] * BT // 4)  # of four queries
        of = tl.min(unit, 0) + block // (BT // 4)
        blocks = tile * (BT // 4) + block % (BT // 4)
        keep = keep_weights(seed, of[:, None], blocks, tk, T, threshold, keep_scale)
        weights *= keep.reshape(weights.shape)
    return weights


@triton.jit
def _full(value, M: tl.constexpr, BT: tl.constexpr):
    """A value for each row of M matrices."""
    if M == 1:
        return tl.full((BT,), value, tl.float32)
    else:
        return tl.full((M, BT), value, tl.float32)


@triton.jit
def _zeros(M: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """M matrices."""
    if M == 1:
        return tl.zeros((BT, BD), tl.float32)
    else:
        return tl.zeros((M, BT, BD), tl.float32)


@triton.jit
def _forward_heads(
    qkv, seed, out, T, tiles, parts, units, scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, M: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [N, P] from qkv [N, 3P]."""
    P: tl.constexpr = HEADS * D
    unit, starts, to, query_tile, tq, d = _place(parts, tiles, T, units, HEADS, D, BD, BT, M)
    highest, total = _full(float("-inf"), M, BT), _full(0.0, M, BT)
    sums = _zeros(M, BT, BD)
    for tile in range(tiles):
        tk = tile * BT + tl.arange(0, BT)
        s = _logits(qkv, starts, tq, tk, scale, T, P, D, BD, PRECISION)
        above = tl.maximum(highest, tl.max(s, -1))
        e = tl.exp2((s - per_row(above)) * LOG2E)
        before = tl.exp2((highest - above) * LOG2E)
        total = total * before + tl.sum(e, -1)
        e = _keep(e, seed, unit, query_tile, tk, T, threshold, keep_scale, BT, DROPOUT)
        v = _rows(qkv + 2 * P, starts, tk, d, 3 * P, T, D)
        sums = sums * per_row(before) + dot(e.to(v.dtype), v, PRECISION)
        highest = above
    _store(out, to, unit, units, tq, d, P, T, sums / per_row(total), D)


@triton.jit
def _backward_rows(
    grad_out, qkv, seed, grad_qkv, statistics, T, tiles, parts, units, scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, M: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of q, and statistics [2, units, tiles * BT]: of each row the logarithm of the
    sum of its weights, and the product of its weights with their gradients."""
    P: tl.constexpr = HEADS * D
    unit, starts, grads, query_tile, tq, d = _place(parts, tiles, T, units, HEADS, D, BD, BT, M)
    highest, total, delta = _full(float("-inf"), M, BT), _full(0.0, M, BT), _full(0.0, M, BT)
    for tile in range(tiles):
        tk = tile * BT + tl.arange(0, BT)
        s = _logits(qkv, starts, tq, tk, scale, T, P, D, BD, PRECISION)
        dw = _products(grad_out, qkv + 2 * P, grads, starts, tq, tk, P, 3 * P, T, D, BD, PRECISION)
        dw = _keep(dw, seed, unit, query_tile, tk, T, threshold, keep_scale, BT, DROPOUT)
        above = tl.maximum(highest, tl.max(s, -1))
        e = tl.exp2((s - per_row(above)) * LOG2E)
        before = tl.exp2((highest - above) * LOG2E)
        total = total * before + tl.sum(e, -1)
        delta = delta * before + tl.sum(e * dw, -1)
        highest = above
    lse = highest + tl.log(total)
    delta /= total
    slots = tiles * BT
    place = unit[:, None] * slots + tq[None, :]
    there = (unit < units)[:, None] & (tq >= 0)[None, :]
    tl.store(statistics + place, lse.reshape(M, BT), mask=there)
    tl.store(statistics + units * slots + place, delta.reshape(M, BT), mask=there)
    dq = _zeros(M, BT, BD)
    for tile in range(tiles):
        tk = tile * BT + tl.arange(0, BT)
        s = _logits(qkv, starts, tq, tk, scale, T, P, D, BD, PRECISION)
        dw = _products(grad_out, qkv + 2 * P, grads, starts, tq, tk, P, 3 * P, T, D, BD, PRECISION)
        dw = _keep(dw, seed, unit, query_tile, tk, T, threshold, keep_scale, BT, DROPOUT)
        ds = tl.exp2((s - per_row(lse)) * LOG2E) * (dw - per_row(delta))
        k = _rows(qkv + P, starts, tk, d, 3 * P, T, D)
        dq += dot(ds.to(k.dtype), k, PRECISION)
    _store(grad_qkv, starts, unit, units, tq, d, 3 * P, T, dq * scale, D)


@triton.jit
def _backward_columns(
    grad_out, qkv, seed, grad_qkv, statistics, T, tiles, parts, units, scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, M: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v; the tiles of the grid are of keys."""
    P: tl.constexpr = HEADS * D
    unit, starts, grads, _, tk, d = _place(parts, tiles, T, units, HEADS, D, BD, BT, M)
    slots = tiles * BT
    dk, dv = _zeros(M, BT, BD), _zeros(M, BT, BD)
    for tile in range(tiles):
        tq = tile * BT + tl.arange(0, BT)
        place = tl.minimum(unit, units - 1)[:, None] * slots + tq[None, :]
        lse = tl.load(statistics + place)
        delta = tl.load(statistics + units * slots + place)
        if M == 1:
            lse, delta = lse.reshape(BT), delta.reshape(BT)
        s = _logits(qkv, starts, tq, tk, scale, T, P, D, BD, PRECISION)
        w = tl.exp2((s - per_row(lse)) * LOG2E)
        dw = _products(grad_out, qkv + 2 * P, grads, starts, tq, tk, P, 3 * P, T, D, BD, PRECISION)
        dw = _keep(dw, seed, unit, tile, tk, T, threshold, keep_scale, BT, DROPOUT)
        ds = w * (dw - per_row(delta))
        w = _keep(w, seed, unit, tile, tk, T, threshold, keep_scale, BT, DROPOUT)
        do = _rows(grad_out, grads, tq, d, P, T, D)
        q = _rows(qkv, starts, tq, d, 3 * P, T, D)
        dv += dot(transposed(w.to(do.dtype)), do, PRECISION)
        dk += dot(transposed(ds.to(q.dtype)), q, PRECISION)
    _store(grad_qkv + P, starts, unit, units, tk, d, 3 * P, T, dk * scale, D)
    _store(grad_qkv + 2 * P, starts, unit, units, tk, d, 3 * P, T, dv, D)


class _Weights:
    """The weights, their heads and patches filled up with zeros to lengths that load in one piece.

    The keys' bias cancels in the softmax; left out, it cannot cost precision.
    """

    def __init__(
        self,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        heads: int,
    ) -> None:
        P = proj_weight.shape[0]
        self.pixels, self.heads, self.head_dim = P, heads, P // heads
        self.length, self.head_length = _rounded(P), _rounded(P // heads)
        rest, head_rest = self.length - P, self.head_length - self.head_dim
        weight = qkv_weight.reshape(3, heads, -1, P)
        self.qkv = F.pad(weight, (0, rest, 0, head_rest)).flatten(0, 2)
        self.qkv_bias = None
        if qkv_bias is not None:
            bias = F.pad(qkv_bias.reshape(3, heads, -1), (0, head_rest))
            bias[1] = 0
            self.qkv_bias = bias.flatten()
        weight = proj_weight.reshape(P, heads, -1)
        self.proj = F.pad(weight, (0, head_rest, 0, 0, 0, rest)).flatten(1)
        self.proj_bias = None if proj_bias is None else F.pad(proj_bias, (0, rest))

    def gradients(
        self, qkv: Tensor, qkv_bias: Tensor, proj: Tensor, proj_bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those of the weights as they came from those of the filled ones."""
        P, heads, dim, none = self.pixels, self.heads, self.head_dim, qkv.new_empty(0)
        qkv = qkv.unflatten(0, (3, heads, -1))[:, :, :dim, :P].reshape(3 * P, P)
        qkv_bias = qkv_bias.unflatten(0, (3, heads, -1))[:, :, :dim].reshape(3 * P)
        qkv_bias[P : 2 * P] = 0
        proj = proj.unflatten(1, (heads, -1))[:P, :, :dim].reshape(P, P)
        return (
            qkv,
            none if self.qkv_bias is None else qkv_bias,
            proj,
            none.clone() if self.proj_bias is None else proj_bias[:P],
        )


def _rounded(length: int) -> int:
    """A length of which 16 bytes of any type are a part; a power of two if it is short."""
    return -(-length // 8) * 8 if length > 8 else triton.next_power_of_2(length)


def _arguments(
    qkv: Tensor,
    weights: _Weights,
    seed: Tensor | None,
    patches: Patches,
    scale: float,
    dropout_p: float,
    kernel: str,
) -> tuple[int, dict[str, Any]]:
    """The number of programs, and what all kernels of one call take."""
    T, D, heads = patches.tokens, weights.head_length, weights.heads
    edge = _triton.shape(problem(patches, qkv), kernel, qkv.device).edge
    tile = min(edge, _triton.power_of_two(T))
    block = min(LONGEST_HEAD, _triton.power_of_two(D))
    tiles, parts = -(-T // tile), -(-D // block)
    matrices = 2 * edge // tile if T <= FEW_TOKENS else 1
    units = patches.B * patches.C * heads
    arguments = {
        **{"qkv": qkv, "seed": qkv if seed is None else seed, "scale": scale, "units": units},
        **{"T": T, "tiles": tiles, "parts": parts, "HEADS": heads, "D": D, "BD": block},
        **{"BT": tile, "M": matrices, "PRECISION": _triton.precision(qkv.dtype)},
        **_triton.dropout_options(dropout_p),
    }
    return -(-units // matrices) * tiles * parts, arguments


def _attend(qkv: Tensor, patches: Patches, programs: int, arguments: dict[str, Any]) -> Tensor:
    """The heads' results side by side."""
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    _triton.launch(_forward_heads, programs, problem(patches, qkv), out=out, **arguments)
    return out


def forward(
    x: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    seed: Tensor | None,
    patches: Patches,
    num_heads: int,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """out [B, H, W, C]."""
    filled = _Weights(*weights, num_heads)
    rows = to_planes(x, patches, filled.length)
    qkv = F.linear(rows, filled.qkv, filled.qkv_bias)
    options = (seed, patches, scale, dropout_p, "forward_heads")
    result = _attend(qkv, patches, *_arguments(qkv, filled, *options))
    return to_map(F.linear(result, filled.proj, filled.proj_bias), patches)


def backward(
    grad_out: Tensor,
    x: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    seed: Tensor | None,
    patches: Patches,
    num_heads: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the weights and the biases (empty where the argument is None)."""
    filled = _Weights(*weights, num_heads)
    rows, grad_rows = (to_planes(t, patches, filled.length) for t in (x, grad_out))
    qkv = F.linear(rows, filled.qkv, filled.qkv_bias)
    options = (seed, patches, scale, dropout_p, "backward_rows")
    programs, arguments = _arguments(qkv, filled, *options)
    grad_proj = grad_rows.mT @ _attend(qkv, patches, programs, arguments)
    grad_result, grad_qkv = grad_rows @ filled.proj, torch.empty_like(qkv)
    slots = arguments["tiles"] * arguments["BT"]
    wide: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    statistics = torch.empty(2, arguments["units"], slots, **wide)
    arguments |= {"grad_out": grad_result, "grad_qkv": grad_qkv, "statistics": statistics}
    for kernel in (_backward_rows, _backward_columns):
        _triton.launch(kernel, programs, problem(patches, qkv), **arguments)
    grad_x = to_map(grad_qkv @ filled.qkv, patches)
    sums = (grad_qkv.mT @ rows, grad_qkv.sum(0), grad_proj, grad_rows.sum(0))
    return grad_x, *filled.gradients(*sums)
