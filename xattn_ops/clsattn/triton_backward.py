"""The gradients of CLS-query cross attention in Triton.

With t the tokens through the norm but for its weight g and shift s, w their weights, m the dropout
and z = sum m w t of a head: dz = W_v^T grad_out, dw = m (g dz . t + const), ds = w (dw - delta),
delta = g dz . z + const sum m w, du = g sum ds t, dt = sum over heads (m w g dz + ds g u). As delta
needs nothing but z, one read of the tokens gives everything, a tile at a time: first the products
with u and dz over all channels, then the gradients, a chunk of channels after the other. What a
part sums over its tokens it stores, and `_join_grads` adds these shares up in a fixed order;
products of small matrices are left to torch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._registration import register_triton
from .._triton import dot
from .triton_kernels import (
    by_head,
    cls_token,
    normed,
    of_head,
    plan,
)

JOINED = 128  # channels that a program of _join_grads takes
# The rows of `numbers`, of each image and head: the sums over channels of g u and g dz, delta and
# const, the sum of the weights kept, and of the CLS token the weight kept and ds.
KEY_SUM, GRAD_SUM, DELTA, CONST, KEPT, CLS_KEPT, CLS_DS, NUMBERS = map(tl.constexpr, range(8))


@triton.jit
def _fold_grads(
    cls, dz, grad_out, v_bias, norm_weight, norm_bias, head_state, token_state,
    keys, grads, pooled, numbers,
    B, stride_cls, stride_grad, tokens, eps, scale, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    SPAN: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """A head of an image: keys = g u, grads = g dz and pooled = g z + s sum m w, all [heads, B, C],
    and the numbers [NUMBERS, B, heads]."""
    h, b = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    c = tl.arange(0, BLOCK)
    row, unit = h * B + b, b * HEADS + h
    numbers += unit
    step = B * HEADS
    line = token_state + (b * (HEADS + 2 if NORM else HEADS) + h) * tokens
    own = tl.load(line)
    own_keep, kept, const = 1.0, 1.0, 0.0
    gradient = tl.load(dz + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    if DROPOUT:
        sums = tl.zeros((SPAN,), tl.float32)
        for start in range(tl.cdiv(tokens, SPAN)):
            n = start * SPAN + tl.arange(0, SPAN)
            p = tl.load(line + n, mask=n < tokens, other=0.0)
            sums += tl.where(p < 0, 0.0, p)  # NaN stays
        kept = tl.sum(sums, 0) * keep_scale
        own_keep = tl.where(own > 0, keep_scale, 0.0)
        own = tl.abs(own)
        if BIAS:  # without dropout the softmax does not see what is the same for all tokens
            in_head = (c >= h * D) & (c < (h + 1) * D)
            values = tl.load(grad_out + b * stride_grad + c, mask=in_head, other=0.0)
            bias = tl.load(v_bias + c, mask=in_head, other=0.0)
            const += tl.sum(values.to(tl.float32) * bias.to(tl.float32), 0)
        if SHIFT:
            shift = tl.load(norm_bias + c, mask=c < C, other=0.0).to(tl.float32)
            const += tl.sum(gradient * shift, 0)
    state = head_state + unit * (D + 2 * C) + D + c
    key = tl.load(state, mask=c < C, other=0.0)
    z = tl.load(state + C, mask=c < C, other=0.0)
    value = z
    if NORM:
        weight = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
        key *= weight
        gradient *= weight
        value *= weight
    if SHIFT:
        value += tl.load(norm_bias + c, mask=c < C, other=0.0).to(tl.float32) * kept
    tl.store(pooled + row * C + c, value.to(pooled.dtype.element_ty), mask=c < C)
    key, gradient = key.to(keys.dtype.element_ty), gradient.to(grads.dtype.element_ty)
    tl.store(keys + row * C + c, key, mask=c < C)
    tl.store(grads + row * C + c, gradient, mask=c < C)
    key, gradient = key.to(tl.float32), gradient.to(tl.float32)
    delta = tl.sum(gradient * z, 0) + const * kept
    x, _mean, _rstd = cls_token(
        cls, token_state, b, stride_cls, tokens, eps, HEADS, C, BLOCK, NORM, True
    )
    dw = own_keep * (tl.sum(gradient * x, 0) + const)
    tl.store(numbers + KEY_SUM * step, tl.sum(key, 0))
    tl.store(numbers + GRAD_SUM * step, tl.sum(gradient, 0))
    tl.store(numbers + DELTA * step, delta)
    tl.store(numbers + CONST * step, const)
    tl.store(numbers + KEPT * step, kept)
    tl.store(numbers + CLS_KEPT * step, own * own_keep)
    tl.store(numbers + CLS_DS * step, own * (dw - delta) * scale)


@triton.jit
def _backward(
    patches, keys, grads, numbers, token_state, grad_patches, part_sums,
    B, N, stride_b, stride_n, parts, per_part, scale, keep_scale,
    HEADS: tl.constexpr, HEAD_ROWS: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_patches [B, N, C], and part_sums [B, parts, heads, C] of scale ds t; grid as forward."""
    part, b = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    first = part * per_part
    last = tl.minimum(first + per_part, N)
    h, t, c = tl.arange(0, HEAD_ROWS), tl.arange(0, TOKENS), tl.arange(0, CHUNK)
    there = (h < HEADS)[:, None]
    rows = ((h * B + b) * C)[:, None]
    lines = token_state + (b * (HEADS + 2 if NORM else HEADS) + h)[:, None] * (N + 1) + 1
    numbers += b * HEADS + h
    delta = tl.load(numbers + DELTA * B * HEADS, mask=h < HEADS, other=0.0)
    if DROPOUT:
        const = tl.load(numbers + CONST * B * HEADS, mask=h < HEADS, other=0.0)
    if NORM:
        key_sum = tl.load(numbers + KEY_SUM * B * HEADS, mask=h < HEADS, other=0.0)
        grad_sum = tl.load(numbers + GRAD_SUM * B * HEADS, mask=h < HEADS, other=0.0)
        moments = token_state + (b * (HEADS + 2) + HEADS) * (N + 1)
        unit = tl.load(moments + N + 1)  # about 1 / deviation of all: keeps what is cast in range
    means = tl.zeros((HEAD_ROWS,), tl.float32)
    sums = ()  # type: tuple[Any, ...]
    for _ in tl.static_range(CHUNKS):
        sums += (tl.zeros((HEAD_ROWS, CHUNK), tl.float32),)
    for step in range(tl.cdiv(last - first, TOKENS)):
        n = first + step * TOKENS + t
        inside = n < last
        at = n.to(tl.int64) if WIDE else n
        pointers = patches + b * stride_b + (at * stride_n)[:, None]
        a = tl.zeros((HEAD_ROWS, TOKENS), tl.float32)
        s = tl.zeros((HEAD_ROWS, TOKENS), tl.float32)
        for i in range(CHUNKS):
            columns = i * CHUNK + c[None, :]
            mask = there if C % CHUNK == 0 else there & (columns < C)
            x = tl.load(pointers + columns, mask=inside[:, None] & (columns < C), other=0.0)
            x = tl.trans(x)
            a += dot(tl.load(grads + rows + columns, mask=mask, other=0.0), x, PRECISION)
            if NORM:
                s += dot(tl.load(keys + rows + columns, mask=mask, other=0.0), x, PRECISION)
        p = tl.load(lines + n[None, :], mask=there & inside[None, :], other=0.0)
        if NORM:
            mean = tl.load(moments + 1 + n, mask=inside, other=0.0)
            rstd = tl.load(moments + N + 2 + n, mask=inside, other=0.0)
            s = (s - key_sum[:, None] * mean[None, :]) * rstd[None, :]
            a = (a - grad_sum[:, None] * mean[None, :]) * rstd[None, :]
        dw = a
        kept = p
        if DROPOUT:
            keep = tl.where(p > 0, keep_scale, 0.0)
            p = tl.abs(p)
            kept = p * keep
            dw = (a + const[:, None]) * keep
        ds = p * (dw - delta[:, None]) * scale
        w = ds
        kept, ds = kept.to(patches.dtype.element_ty), ds.to(patches.dtype.element_ty)
        if NORM:  # sums over channels of dt and of dt t, from those of the heads
            wide_kept, wide_ds = kept.to(tl.float32), ds.to(tl.float32)
            plain = tl.sum(wide_kept * grad_sum[:, None] + wide_ds * key_sum[:, None], 0) / C
            along = tl.sum(wide_kept * a + wide_ds * s, 0) / C
            w *= (rstd / unit)[None, :]
        w = w.to(patches.dtype.element_ty)
        if NORM:
            means += tl.sum(w.to(tl.float32) * mean[None, :], 1)
        to = grad_patches + b * N * C + (at * C)[:, None]
        more = ()  # type: tuple[Any, ...]
        for i in tl.static_range(CHUNKS):
            columns = i * CHUNK + c[None, :]
            mask = there if C % CHUNK == 0 else there & (columns < C)
            gradient = tl.load(grads + rows + columns, mask=mask, other=0.0)
            key = tl.load(keys + rows + columns, mask=mask, other=0.0)
            mask = inside[:, None] & (columns < C)
            x = tl.load(pointers + columns, mask=mask, other=0.0)  # a tile that the cache holds
            dt = dot(tl.trans(kept), gradient, PRECISION) + dot(tl.trans(ds), key, PRECISION)
            if NORM:
                hat = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
                dt = (dt - plain[:, None] - hat * along[:, None]) * rstd[:, None]
            tl.store(to + columns, dt.to(x.dtype), mask=mask)
            more += (sums[i] + dot(w, x, PRECISION),)
        sums = more
    to = part_sums + ((b * parts + part) * HEADS + h)[:, None] * C + c[None, :]
    for i in tl.static_range(CHUNKS):
        share = (sums[i] - means[:, None]) * unit if NORM else sums[i]
        tl.store(to + i * CHUNK, share, mask=there & (i * CHUNK + c < C)[None, :])


@triton.jit
def _join_grads(
    cls, dz, norm_weight, head_state, token_state, keys, grads, numbers, part_sums,
    du, grad_tokens, norm_sums, B, stride_cls, tokens, parts,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, JOINED: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """JOINED channels of an image: du [heads, B, C] with the scale; grad_tokens [B, C], dt of the
    CLS token as a key; norm_sums [2, B, C], the gradients of the norm's weight and shift."""
    blocks: tl.constexpr = (C + JOINED - 1) // JOINED
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * JOINED + tl.arange(0, JOINED)
    x = tl.load(cls + b * stride_cls + c, mask=c < C, other=0.0).to(tl.float32)
    if NORM:
        moments = token_state + (b * (HEADS + 2) + HEADS) * tokens
        x = (x - tl.load(moments)) * tl.load(moments + tokens)
        weight = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
    dt = tl.zeros((JOINED,), tl.float32)
    by_weight = tl.zeros((JOINED,), tl.float32)
    by_shift = tl.zeros((JOINED,), tl.float32)
    for h in range(HEADS):
        row, unit = (h * B + b) * C + c, b * HEADS + h
        own = tl.load(numbers + CLS_DS * B * HEADS + unit)
        total = own * x
        for part in range(parts):
            place = part_sums + ((b * parts + part) * HEADS + h) * C + c
            total += tl.load(place, mask=c < C, other=0.0)
        key = tl.load(keys + row, mask=c < C, other=0.0).to(tl.float32)
        gradient = tl.load(grads + row, mask=c < C, other=0.0).to(tl.float32)
        dt += tl.load(numbers + CLS_KEPT * B * HEADS + unit) * gradient + own * key
        if NORM:
            state = head_state + unit * (D + 2 * C) + D + c
            u = tl.load(state, mask=c < C, other=0.0)
            z = tl.load(state + C, mask=c < C, other=0.0)
            plain = tl.load(dz + row, mask=c < C, other=0.0).to(tl.float32)
            by_weight += plain * z + u * total
            by_shift += plain * tl.load(numbers + KEPT * B * HEADS + unit)
            total *= weight
        tl.store(du + row, total.to(du.dtype.element_ty), mask=c < C)
    tl.store(grad_tokens + b * C + c, dt, mask=c < C)
    if NORM:
        tl.store(norm_sums + b * C + c, by_weight, mask=c < C)
        tl.store(norm_sums + (B + b) * C + c, by_shift, mask=c < C)


@triton.jit
def _finish(
    cls, by_query, norm_weight, token_state, grad_tokens, norm_sums, grad_cls,
    B, stride_cls, tokens, eps,
    HEADS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """grad_cls [B, C], an image a program: what CLS gets as a key and by_query [B, C], through the
    norm, whose sums get the latter."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    x, _mean, rstd = cls_token(
        cls, token_state, b, stride_cls, tokens, eps, HEADS, C, BLOCK, NORM, True
    )
    dt = tl.load(grad_tokens + b * C + c, mask=c < C, other=0.0)
    extra = tl.load(by_query + b * C + c, mask=c < C, other=0.0).to(tl.float32)
    if NORM:
        for i in tl.static_range(2):
            place = norm_sums + (i * B + b) * C + c
            sums = tl.load(place, mask=c < C, other=0.0)
            tl.store(place, sums + (extra * x if i == 0 else extra), mask=c < C)
        extra *= tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
    dt += extra
    if NORM:
        plain, along = tl.sum(dt, 0) / C, tl.sum(dt * x, 0) / C
        dt = (dt - plain - x * along) * rstd
    tl.store(grad_cls + b * C + c, dt.to(grad_cls.dtype.element_ty), mask=c < C)


def clsattn_bwd(
    grad_out: Tensor,
    cls_token: Tensor,
    patches: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    head_state: Tensor,
    token_state: Tensor,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the tensors from cls_token to norm_bias (empty where the argument is None)."""
    cls, patches = _triton.dense(cls_token[:, 0]), _triton.dense(patches)
    grad_out = _triton.dense(grad_out[:, 0])
    head_state, token_state = head_state.contiguous(), token_state.contiguous()
    (B, N, C), heads, dtype = patches.shape, num_heads, patches.dtype
    given = (q_weight, q_bias, k_weight, v_weight, v_bias, norm_weight, norm_bias)
    grad_cls, grad_patches = patches.new_empty(B, 1, C), patches.new_empty(B, N, C)
    if not B:
        zeros = (patches.new_zeros(0 if t is None else t.shape) for t in given)
        return (grad_cls, grad_patches, *zeros)  # type: ignore[return-value]
    options = (heads, eps, scale, dropout_p, "backward")
    call = plan(cls, patches, norm_weight, norm_bias, seed, *options)
    by_weight = by_head(grad_out, heads)  # [heads, B, D]
    dz = torch.bmm(by_weight, of_head(v_weight, heads))  # [heads, B, C]
    keys, grads, pooled, du = (torch.empty_like(dz) for _ in range(4))
    wide: dict[str, Any] = {"dtype": torch.float32, "device": patches.device}
    numbers = torch.empty(NUMBERS.value, B, heads, **wide)
    part_sums = torch.empty(B, call.parts, heads, C, **wide)
    grad_tokens, norm_sums = torch.empty(B, C, **wide), torch.empty(2, B, C, **wide)
    state: dict[str, Any] = {"head_state": head_state, "token_state": token_state, "dz": dz}
    state |= {"keys": keys, "grads": grads, "numbers": numbers, "part_sums": part_sums}
    state |= {"grad_out": grad_out, "stride_grad": grad_out.stride(0), "pooled": pooled}
    state |= {"v_bias": patches if v_bias is None else v_bias.contiguous()}
    state |= {"BIAS": v_bias is not None, "grad_patches": grad_patches, "grad_cls": grad_cls}
    state |= {"du": du, "grad_tokens": grad_tokens, "norm_sums": norm_sums, "JOINED": JOINED}
    call.launch(_fold_grads, B * heads, **state)
    call.launch(_backward, B * call.parts, **state)
    call.launch(_join_grads, B * -(-C // JOINED), **state)

    q = head_state[..., : C // heads].to(dtype).transpose(0, 1)  # [heads, B, D]
    dq = torch.bmm(du, of_head(k_weight, heads).mT).transpose(0, 1).reshape(B, C)
    by_query = torch.mm(dq, q_weight)
    call.launch(_finish, B, by_query=by_query, **state)
    kept = numbers[KEPT.value, ..., None]  # [B, heads, 1]
    values = (grad_out.unflatten(-1, (heads, -1)) * kept).sum(0)  # [heads, D], float32
    of_norm = norm_sums.sum(1)  # [2, C]
    weights = (
        torch.mm(dq.mT, normed(cls, norm_weight, norm_bias, eps)),
        dq.sum(0),
        torch.bmm(q.mT, du).view(C, C),
        torch.bmm(by_weight.mT, pooled).view(C, C),
        values.flatten().to(dtype),
        of_norm[0].to(dtype),
        of_norm[1].to(dtype),
    )
    sums = (patches.new_empty(0) if t is None else w for t, w in zip(given, weights, strict=True))
    return (grad_cls, grad_patches, *sums)  # type: ignore[return-value]


register_triton("clsattn_bwd", clsattn_bwd)
