"""Digest-token attention in Triton.

A program takes a tile of queries of one image and head through two loops over keys with one online
softmax: the tokens of the image, then the digests. The place of a relative bias in its table is
arithmetic on rows and columns of the grid; no index, no bias and no weight is ever stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tiles, _triton
from .._registration import register_triton
from .._triton import LOG2E, dot, keep_weights


@triton.jit
def _rows(pointer, row, stride, d):
    """Pointers to [row, d]; an image may have offsets beyond 32 bits."""
    return pointer + (row.to(tl.int64) * stride)[:, None] + d[None, :]


@triton.jit
def _scores(
    q, k, bias, head, i, j, n_keys, tokens, prefix, grid_w, patches, scale,
    DIGESTS: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of the queries i and the keys j; -inf beyond the last key.

    bias: [heads, patches] by |dy| * grid_w + |dx| where the keys are tokens, [heads, n_keys] where
    they are digests.
    """
    s = dot(q, tl.trans(k), PRECISION) * scale
    if HAS_BIAS and DIGESTS:
        column = tl.load(bias + head * n_keys + j, mask=j < n_keys, other=0.0)
        s += column.to(tl.float32)[None, :]
    if HAS_BIAS and not DIGESTS:
        p, o = i - prefix, j - prefix
        dy = tl.abs(p[:, None] // grid_w - o[None, :] // grid_w)
        dx = tl.abs(p[:, None] % grid_w - o[None, :] % grid_w)
        both = ((p >= 0) & (i < tokens))[:, None] & ((o >= 0) & (j < tokens))[None, :]
        relative = tl.load(bias + head * patches + dy * grid_w + dx, mask=both, other=0.0)
        s += relative.to(tl.float32)
    return tl.where((j < n_keys)[None, :], s, float("-inf"))


@triton.jit
def _attend(
    q, highest, total, sums, keys, values, stride, bias, seed, unit, query_tile, head, i, first_key,
    n_keys, tokens, all_keys, prefix, grid_w, patches, scale, threshold, keep_scale,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    DIGESTS: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of the queries over n_keys keys: the highest logit of each row, the sum of its
    weights, and the sum of weighted values. first_key: what number the mask gives to key 0."""
    d = tl.arange(0, BD)
    for start in range(0, n_keys, BK):
        j = start + tl.arange(0, BK)
        mask = (j < n_keys)[:, None] & (d < D)[None, :]
        k = tl.load(_rows(keys, j, stride, d), mask=mask, other=0.0)
        v = tl.load(_rows(values, j, stride, d), mask=mask, other=0.0)
        s = _scores(
            q, k, bias, head, i, j, n_keys, tokens, prefix, grid_w, patches, scale,
            DIGESTS, HAS_BIAS, PRECISION,
        )  # fmt: skip
        above = tl.maximum(highest, tl.max(s, 1))
        e = tl.exp2((s - above[:, None]) * LOG2E)  # the difference is exact; logits may be huge
        before = tl.exp2((highest - above) * LOG2E)
        total = total * before + tl.sum(e, 1)
        if DROPOUT:
            blocks = query_tile * (BQ // 4) + tl.arange(0, BQ // 4)
            number = first_key + j
            e *= keep_weights(seed, unit, blocks, number, all_keys, threshold, keep_scale)
        sums = sums * before[:, None] + dot(e.to(v.dtype), v, PRECISION)
        highest = above
    return highest, total, sums


@triton.jit
def _forward(
    qkv, digest_kv, table, digest_bias, seed, out, row_stats,
    stride_b, stride_n, digest_stride_b, digest_stride_n,
    tokens, digests, prefix, grid_w, patches, query_tiles, scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    HAS_TABLE: tl.constexpr, HAS_DIGESTS: tl.constexpr, HAS_DIGEST_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, N, C] and row_stats [B, heads, N, 2]: the highest logit of a row, and one over the
    sum of its weights before they are scaled to one. Grid: images x query tiles x heads."""
    C: tl.constexpr = HEADS * D
    head = tl.program_id(0) % HEADS
    query_tile = tl.program_id(0) // HEADS % query_tiles
    image = (tl.program_id(0) // (HEADS * query_tiles)).to(tl.int64)
    unit = image * HEADS + head
    i, d = query_tile * BQ + tl.arange(0, BQ), tl.arange(0, BD)
    mask = (i < tokens)[:, None] & (d < D)[None, :]
    base = qkv + image * stride_b + head * D
    q = tl.load(_rows(base, i, stride_n, d), mask=mask, other=0.0)
    highest = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    sums = tl.zeros((BQ, BD), tl.float32)
    highest, total, sums = _attend(
        q, highest, total, sums, base + C, base + 2 * C, stride_n, table, seed, unit, query_tile,
        head, i, 0, tokens, tokens, tokens + digests, prefix, grid_w, patches, scale, threshold,
        keep_scale, D, BQ, BK, BD, False, HAS_TABLE, DROPOUT, PRECISION,
    )  # fmt: skip
    if HAS_DIGESTS:
        base = digest_kv + image * digest_stride_b + head * D
        highest, total, sums = _attend(
            q, highest, total, sums, base, base + C, digest_stride_n, digest_bias, seed, unit,
            query_tile, head, i, tokens, digests, tokens, tokens + digests, prefix, grid_w, patches,
            scale, threshold, keep_scale, D, BQ, BK, BD, True, HAS_DIGEST_BIAS, DROPOUT, PRECISION,
        )  # fmt: skip
    weight = 1 / total
    to = _rows(out + image * tokens * C + head * D, i, C, d)
    tl.store(to, (sums * weight[:, None]).to(out.dtype.element_ty), mask=mask)
    stats = row_stats + (unit * tokens + i) * 2
    tl.store(stats, highest, mask=i < tokens)
    tl.store(stats + 1, weight, mask=i < tokens)


def problem(qkv: Tensor, num_heads: int) -> _tiles.Problem:
    """What the table of tiles knows of a call."""
    return _tiles.Problem("digest", qkv.shape[2] // 3 // num_heads, qkv.shape[1], qkv.dtype)


def arguments(
    qkv: Tensor,
    digest_kv: Tensor | None,
    bias_table: Tensor | None,
    digest_bias: Tensor | None,
    row_stats: Tensor,
    seed: Tensor | None,
    num_heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    scale: float,
    dropout_p: float,
    kernel: str,
) -> dict[str, Any]:
    """What every kernel of one call takes, by the names of its parameters."""
    N, head_dim = qkv.shape[1], qkv.shape[2] // 3 // num_heads
    digests = 0 if digest_kv is None else digest_kv.shape[1]
    absent = qkv  # a pointer that no kernel follows
    kv = absent if digest_kv is None else digest_kv
    # Half as many keys as queries: 64 x 64 scores and the indices of their bias would spill.
    queries = _triton.shape(problem(qkv, num_heads), kernel, qkv.device).edge
    return {
        "qkv": qkv,
        "digest_kv": kv,
        "table": absent if bias_table is None else bias_table.contiguous(),
        "digest_bias": absent if digest_bias is None else digest_bias.contiguous(),
        "seed": absent if seed is None else seed,
        "row_stats": row_stats,
        **{"stride_b": qkv.stride(0), "stride_n": qkv.stride(1)},
        **{"digest_stride_b": kv.stride(0), "digest_stride_n": kv.stride(1)},
        **{"tokens": N, "digests": digests, "prefix": num_prefix_tokens},
        **{"grid_w": grid[1], "patches": grid[0] * grid[1], "query_tiles": -(-N // queries)},
        **{"scale": scale, "HEADS": num_heads, "D": head_dim, "BQ": queries, "BK": queries // 2},
        "BD": _triton.power_of_two(head_dim),
        **{"HAS_TABLE": bias_table is not None, "HAS_DIGESTS": digests > 0},
        "HAS_DIGEST_BIAS": digest_bias is not None,
        "PRECISION": _triton.precision(qkv.dtype),
        **_triton.dropout_options(dropout_p),
    }


def digest_fwd(
    qkv: Tensor,
    digest_kv: Tensor | None,
    bias_table: Tensor | None,
    digest_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    grid_h: int,
    grid_w: int,
    num_prefix_tokens: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out [B, N, C] and row_stats; the arguments are those of the native op of this name."""
    qkv = _triton.dense(qkv)
    digest_kv = None if digest_kv is None else _triton.dense(digest_kv)
    B, N, C3 = qkv.shape
    out = qkv.new_empty(B, N, C3 // 3)
    row_stats = qkv.new_empty(B, num_heads, N, 2, dtype=torch.float32)
    if out.numel():
        given = arguments(
            qkv, digest_kv, bias_table, digest_bias, row_stats, seed, num_heads, (grid_h, grid_w),
            num_prefix_tokens, scale, dropout_p, "forward",
        )  # fmt: skip
        programs = B * given["query_tiles"] * num_heads
        _triton.launch(_forward, programs, problem(qkv, num_heads), out=out, **given)
    return out, row_stats


register_triton("digest_fwd", digest_fwd)
