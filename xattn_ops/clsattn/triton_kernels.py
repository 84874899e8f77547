"""CLS-query cross attention in Triton.

Of a head the kernels need u = q W_k (its key, times the norm's weight) and z, the weighted sum of
the tokens; q, u and W_v z are products of small matrices, left to torch. The patches of an image
are cut into parts, a program each, which form the logits (x . u - mean sum u) / deviation and the
weighted sum of the tokens in one read; `_join` makes one softmax of the parts and of the CLS token,
a part of its own. Channels are taken in chunks, so that no tile outgrows the registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import _tiles, _triton
from .._registration import register_triton
from .._triton import LOG2E, dot, keep_weights_of_one

WIDEST_CHUNK = 256  # channels
PROGRAMS = 1024  # about as many as fill a large card twice
LEAST_PART = 64  # tokens: below, loading u costs more than the tokens
SPAN = 1024  # tokens of a row of weights that are normalised together


@triton.jit
def cls_token(
    cls, token_state, b, stride_cls, tokens, eps, HEADS: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """The token of image b through the norm but for weight and shift, [BLOCK], with its mean and
    1 / deviation: those of the state where they are KNOWN."""
    c = tl.arange(0, BLOCK)
    x = tl.load(cls + b * stride_cls + c, mask=c < C, other=0.0).to(tl.float32)
    mean, rstd = 0.0, 1.0
    if NORM:
        moments = token_state + (b * (HEADS + 2) + HEADS) * tokens
        if KNOWN:
            mean, rstd = tl.load(moments), tl.load(moments + tokens)
            x = tl.where(c < C, x - mean, 0.0) * rstd
        else:
            mean = tl.sum(x, 0) / C
            x = tl.where(c < C, x - mean, 0.0)
            rstd = 1 / tl.sqrt(tl.sum(x * x, 0) / C + eps)
            x *= rstd
    return x, mean, rstd


@triton.jit
def _fold(
    q, u, cls, norm_weight, seed, head_state, token_state, keys, key_sums, part_stats,
    B, stride_cls, tokens, parts, eps, scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A head of an image: its q [B, C] and u [heads, B, C] into the state, keys [heads, B, C] = u
    times the norm's weight and key_sums [B, heads], and the CLS token's part of the softmax."""
    h, b = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    c = tl.arange(0, BLOCK)
    row, unit = h * B + b, b * HEADS + h
    state = head_state + unit * (D + 2 * C)
    in_head = (c >= h * D) & (c < (h + 1) * D)
    values = tl.load(q + b * C + c, mask=in_head, other=0.0).to(tl.float32)
    tl.store(state + c - h * D, values, mask=in_head)
    key = tl.load(u + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(state + D + c, key, mask=c < C)
    if NORM:
        key *= tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
    key = key.to(keys.dtype.element_ty)
    tl.store(keys + row * C + c, key, mask=c < C)
    key = key.to(tl.float32)
    tl.store(key_sums + unit, tl.sum(key, 0))
    x, mean, rstd = cls_token(
        cls, token_state, b, stride_cls, tokens, eps, HEADS, C, BLOCK, NORM, False
    )
    if NORM:
        moments = token_state + (b * (HEADS + 2) + HEADS) * tokens
        tl.store(moments, mean, mask=h == 0)
        tl.store(moments + tokens, rstd, mask=h == 0)
    logit = tl.sum(key * x, 0) * (scale * LOG2E)
    stats = part_stats + ((b * (parts + 1) + parts) * HEADS + h) * 3
    tl.store(stats, logit)
    tl.store(stats + 1, 1.0)
    if DROPOUT:
        keep = keep_weights_of_one(
            seed, unit + tl.arange(0, 1), tl.arange(0, 1), threshold, keep_scale
        )
        tl.store(stats + 2, tl.sum(tl.sum(keep, 1), 0))


@triton.jit
def _forward(
    patches, keys, key_sums, seed, token_state, part_sums, part_stats,
    B, N, stride_b, stride_n, parts, per_part, eps, scale, threshold, keep_scale,
    HEADS: tl.constexpr, HEAD_ROWS: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """part_sums [B, parts, heads, C], the weighted sum of a part's tokens, and part_stats [B, parts
    + 1, heads, 3]: the highest logit, and relative to it the sum of the weights and of those kept.
    Logits are in powers of two; they go to token_state."""
    part, b = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    first = part * per_part
    last = tl.minimum(first + per_part, N)
    h, t, c = tl.arange(0, HEAD_ROWS), tl.arange(0, TOKENS), tl.arange(0, CHUNK)
    there = (h < HEADS)[:, None]
    rows = keys + ((h * B + b) * C)[:, None]
    lines = token_state + (b * (HEADS + 2 if NORM else HEADS) + h)[:, None] * (N + 1) + 1
    highest = tl.full((HEAD_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((HEAD_ROWS,), tl.float32)
    kept = tl.zeros((HEAD_ROWS,), tl.float32)
    means = tl.zeros((HEAD_ROWS,), tl.float32)
    sums = ()  # type: tuple[Any, ...]
    for _ in tl.static_range(CHUNKS):
        sums += (tl.zeros((HEAD_ROWS, CHUNK), tl.float32),)
    if NORM:
        key_sum = tl.load(key_sums + b * HEADS + h, mask=h < HEADS, other=0.0)
        moments = token_state + (b * (HEADS + 2) + HEADS) * (N + 1)
        unit = tl.load(moments + N + 1)  # about 1 / deviation of all: keeps what is cast in range
        moments += 1
    for step in range(tl.cdiv(last - first, TOKENS)):
        n = first + step * TOKENS + t
        inside = n < last
        at = n.to(tl.int64) if WIDE else n
        pointers = patches + b * stride_b + (at * stride_n)[:, None]
        s = tl.zeros((HEAD_ROWS, TOKENS), tl.float32)
        mean = tl.zeros((TOKENS,), tl.float32)
        square = tl.zeros((TOKENS,), tl.float32)  # of what is apart from the mean
        for i in range(CHUNKS):
            columns = i * CHUNK + c[None, :]
            x = tl.load(pointers + columns, mask=inside[:, None] & (columns < C), other=0.0)
            key = tl.load(rows + columns, mask=there & (columns < C), other=0.0)
            s += dot(key, tl.trans(x), PRECISION)
            if NORM:  # the moments of the chunk, joined to those of the channels before
                before, width = i * CHUNK, min(CHUNK, C - i * CHUNK)
                x = x.to(tl.float32)
                own = tl.sum(x, 1) / width
                apart = tl.where(columns < C, x - own[:, None], 0.0)
                further = own - mean
                mean += further * (width / (before + width))
                square += tl.sum(apart * apart, 1)
                square += further * further * (before * (width / (before + width)))
        if NORM:
            rstd = 1 / tl.sqrt(tl.where(inside, square / C + eps, 1.0))
            tl.store(moments + n, mean, mask=inside)
            tl.store(moments + N + 1 + n, rstd, mask=inside)
            s = (s - key_sum[:, None] * mean[None, :]) * rstd[None, :]
        s *= scale * LOG2E
        tl.store(lines + n[None, :], s, mask=there & inside[None, :])
        s = tl.where(inside[None, :], s, float("-inf"))
        above = tl.maximum(highest, tl.max(s, 1))
        w = tl.exp2(s - above[:, None])
        left = tl.exp2(highest - above)
        total = total * left + tl.sum(w, 1)
        if DROPOUT:
            keep = keep_weights_of_one(seed, b * HEADS + h, n + 1, threshold, keep_scale)
            w *= keep
            kept = kept * left + tl.sum(w, 1)
        if NORM:
            w *= (rstd / unit)[None, :]
        short = w.to(patches.dtype.element_ty)
        if NORM:
            means = means * left + tl.sum(short.to(tl.float32) * mean[None, :], 1)
        more = ()  # type: tuple[Any, ...]
        for i in tl.static_range(CHUNKS):
            columns = i * CHUNK + c[None, :]
            mask = inside[:, None] & (columns < C)
            x = tl.load(pointers + columns, mask=mask, other=0.0)  # a tile that the cache holds
            more += (sums[i] * left[:, None] + dot(short, x, PRECISION),)
        sums = more
        highest = above
    to = part_sums + ((b * parts + part) * HEADS + h)[:, None] * C + c[None, :]
    for i in tl.static_range(CHUNKS):
        mask = there & (i * CHUNK + c < C)[None, :]
        share = (sums[i] - means[:, None]) * unit if NORM else sums[i]
        tl.store(to + i * CHUNK, share, mask=mask)
    stats = part_stats + ((b * (parts + 1) + part) * HEADS + h) * 3
    tl.store(stats, highest, mask=h < HEADS)
    tl.store(stats + 1, total, mask=h < HEADS)
    if DROPOUT:
        tl.store(stats + 2, kept, mask=h < HEADS)


@triton.jit
def _join(
    cls, norm_weight, norm_bias, seed, head_state, token_state, part_sums, part_stats,
    pooled, shares, B, stride_cls, tokens, parts, eps, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    SPAN: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A head of an image: pooled [heads, B, C], the weighted sum of the normed tokens, and shares
    [heads, B], the sum of the weights kept; the weights before dropout into token_state, negative
    where they are dropped."""
    h, b = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    c = tl.arange(0, BLOCK)
    row, unit = h * B + b, b * HEADS + h
    stats = part_stats + (b * (parts + 1) * HEADS + h) * 3
    top = tl.load(stats)
    for part in range(1, parts + 1):
        top = tl.maximum(top, tl.load(stats + part * HEADS * 3))
    total = tl.exp2(tl.load(stats) - top) * tl.load(stats + 1)
    for part in range(1, parts + 1):
        place = stats + part * HEADS * 3
        total += tl.exp2(tl.load(place) - top) * tl.load(place + 1)
    x, _mean, _rstd = cls_token(
        cls, token_state, b, stride_cls, tokens, eps, HEADS, C, BLOCK, NORM, True
    )
    place = stats + parts * HEADS * 3
    own = tl.exp2(tl.load(place) - top) / total
    share, weight = 1.0, own
    if DROPOUT:
        weight = own * tl.load(place + 2)
        share = weight
    z = weight * x
    for part in range(parts):
        place = stats + part * HEADS * 3
        level = tl.exp2(tl.load(place) - top) / total
        sums = part_sums + ((b * parts + part) * HEADS + h) * C + c
        z += tl.load(sums, mask=c < C, other=0.0) * level
        if DROPOUT:
            share += tl.load(place + 2) * level
    tl.store(head_state + unit * (D + 2 * C) + D + C + c, z, mask=c < C)
    if DROPOUT:
        tl.store(shares + row, share)
    if NORM:
        z *= tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
    if SHIFT:
        z += tl.load(norm_bias + c, mask=c < C, other=0.0).to(tl.float32) * share
    tl.store(pooled + row * C + c, z.to(pooled.dtype.element_ty), mask=c < C)
    line = token_state + (b * (HEADS + 2 if NORM else HEADS) + h) * tokens
    for start in range(tl.cdiv(tokens, SPAN)):
        n = start * SPAN + tl.arange(0, SPAN)
        p = tl.exp2(tl.load(line + n, mask=(n > 0) & (n < tokens), other=0.0) - top) / total
        p = tl.where(n == 0, own, p)
        if DROPOUT:
            units = unit + tl.arange(0, 1)
            keep = tl.sum(keep_weights_of_one(seed, units, n, threshold, keep_scale), 0)
            p = tl.where(keep > 0, p, -p)
        tl.store(line + n, p, mask=n < tokens)


class Call(NamedTuple):
    """What the kernels of one call take, by the names of their parameters."""

    problem: _tiles.Problem
    arguments: dict[str, Any]
    parts: int

    def launch(self, kernel: Any, programs: int, **more: Any) -> None:
        """With those of these arguments, and of more, that the kernel has."""
        given = self.arguments | more
        needed = {name: given[name] for name in kernel.arg_names}
        _triton.launch(kernel, programs, self.problem, **needed)


def chunks(channels: int) -> tuple[int, int]:
    """The width of a chunk of channels, and how many: the least padding in at most four, or the
    widest."""
    widths = [16, 32, 64, 128, WIDEST_CHUNK]
    counts = [(width, -(-channels // width)) for width in widths]
    few = [pair for pair in counts if pair[1] <= 4 or pair[0] == WIDEST_CHUNK]
    return min(few, key=lambda pair: (pair[0] * pair[1], pair[1]))


def plan(
    cls: Tensor,
    patches: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    scale: float,
    dropout_p: float,
    kernel: str,
) -> Call:
    """The sizes, and the parts of the patches: by their numbers alone, never by the card, so that
    sums come out the same everywhere. cls [B, C]."""
    B, N, C = patches.shape
    parts = max(1, min(N // LEAST_PART, PROGRAMS // max(B, 1)))
    per_part = -(-N // parts)
    parts = -(-N // per_part)
    width, count = chunks(C)
    problem = _tiles.Problem("clsattn", C, N, patches.dtype)
    tokens = _triton.shape(problem, kernel, patches.device).edge
    absent = patches  # a pointer that no kernel follows
    arguments = {
        **{"cls": cls, "patches": patches},
        "norm_weight": absent if norm_weight is None else norm_weight.contiguous(),
        "norm_bias": absent if norm_bias is None else norm_bias.contiguous(),
        "seed": absent if seed is None else seed,
        **{"B": B, "N": N, "tokens": N + 1, "parts": parts, "per_part": per_part},
        **{"stride_cls": cls.stride(0), "stride_b": patches.stride(0)},
        **{"stride_n": patches.stride(1), "eps": eps, "scale": scale},
        **{"HEADS": num_heads, "HEAD_ROWS": _triton.power_of_two(num_heads)},
        **{"D": C // num_heads, "C": C, "BLOCK": _triton.power_of_two(C)},
        **{"CHUNK": width, "CHUNKS": count, "TOKENS": tokens, "SPAN": SPAN},
        **{"NORM": norm_weight is not None, "SHIFT": norm_bias is not None},
        "PRECISION": _triton.precision(patches.dtype),
        "WIDE": N * max(patches.stride(1), C) >= 2**31,
        **_triton.dropout_options(dropout_p),
    }
    return Call(problem, arguments, parts)


def normed(cls: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float) -> Tensor:
    """The CLS tokens [B, C] through the norm, if there is one."""
    if norm_weight is None:
        return cls
    return F.layer_norm(cls, cls.shape[-1:], norm_weight, norm_bias, eps)


def by_head(rows: Tensor, num_heads: int) -> Tensor:
    """[..., C] as [heads, ..., D]."""
    return rows.unflatten(-1, (num_heads, -1)).movedim(-2, 0)


def of_head(weight: Tensor, num_heads: int) -> Tensor:
    """The rows of a weight [C, C] as [heads, D, C]."""
    return weight.unflatten(0, (num_heads, -1))


def clsattn_fwd(
    cls_token: Tensor,
    patches: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, 1, C] and what the backward needs; the arguments are those of the native op of this
    name. Unlike there, u in head_state is without the scale, and weights in token_state are
    negative where dropout drops them."""
    cls, patches = _triton.dense(cls_token[:, 0]), _triton.dense(patches)
    (B, N, C), heads = patches.shape, num_heads
    wide: dict[str, Any] = {"dtype": torch.float32, "device": patches.device}
    rows = heads if norm_weight is None else heads + 2
    out = patches.new_empty(B, 1, C)
    head_state = torch.empty(B, heads, C // heads + 2 * C, **wide)
    token_state = torch.empty(B, rows, 1 + N, **wide)
    if not B:
        return out, head_state, token_state
    options = (heads, eps, scale, dropout_p, "forward")
    call = plan(cls, patches, norm_weight, norm_bias, seed, *options)
    q = F.linear(normed(cls, norm_weight, norm_bias, eps), q_weight, q_bias)
    u = torch.bmm(by_head(q, heads), of_head(k_weight, heads))  # [heads, B, C]
    keys, pooled = torch.empty_like(u), torch.empty_like(u)
    key_sums, shares = torch.empty(B, heads, **wide), torch.empty(heads, B, 1, **wide)
    part_sums = torch.empty(B, call.parts, heads, C, **wide)
    part_stats = torch.empty(B, call.parts + 1, heads, 3, **wide)
    state: dict[str, Any] = {"head_state": head_state, "token_state": token_state, "keys": keys}
    state |= {"key_sums": key_sums, "part_sums": part_sums, "part_stats": part_stats}
    call.launch(_fold, B * heads, q=q, u=u, **state)
    call.launch(_forward, B * call.parts, **state)
    call.launch(_join, B * heads, pooled=pooled, shares=shares, **state)
    values = of_head(v_weight, heads).mT  # [heads, C, D]
    if v_bias is None:
        result = torch.bmm(pooled, values)
    else:
        bias = by_head(v_bias, heads)[:, None]  # [heads, 1, D]
        bias = bias * shares.to(bias.dtype) if dropout_p > 0 else bias
        result = torch.baddbmm(bias, pooled, values)
    out.view(B, heads, -1).copy_(result.movedim(0, 1))
    return out, head_state, token_state


register_triton("clsattn_fwd", clsattn_fwd)
