"""The gradients of digest-token attention in Triton.

The weights are recomputed from the statistics of their rows. Rows give the gradient of q and what
the softmax takes back from each row; columns give those of k and v, of tokens and of digests, and
the digests' bias. The relative table has kernels of its own: pairs of bands of grid rows sum the
gradients of their logits over images and fold them by dy and |dx|, and what the pairs have of the
same |dy| is added up. Every sum has a fixed order, and nothing is of size N x N.
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
from .triton_kernels import _rows, _scores, arguments, problem

IMAGES = 32  # at most as many shares of the table's gradient
ROWS = 8  # at most, of a band


@triton.jit
def _weights(
    q, k, v, do, bias, highest, weight, seed, unit, query_tile, head, i, j, first_key, n_keys,
    tokens, all_keys, prefix, grid_w, patches, scale, threshold, keep_scale, BQ: tl.constexpr,
    DIGESTS: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of weights, the same as they met the values, and their gradients."""
    s = _scores(
        q, k, bias, head, i, j, n_keys, tokens, prefix, grid_w, patches, scale,
        DIGESTS, HAS_BIAS, PRECISION,
    )  # fmt: skip
    p = tl.exp2((s - highest[:, None]) * LOG2E) * weight[:, None]
    dp = dot(do, tl.trans(v), PRECISION)
    kept = p
    if DROPOUT:
        blocks = query_tile * (BQ // 4) + tl.arange(0, BQ // 4)
        number = first_key + j
        keep = keep_weights(seed, unit, blocks, number, all_keys, threshold, keep_scale)
        kept = p * keep
        dp *= keep
    return p, kept, dp


@triton.jit
def _row_pass(
    q, do, result, delta, share, keys, values, stride, bias, highest, weight, seed, unit,
    query_tile, head, i, first_key, n_keys, tokens, all_keys, prefix, grid_w, patches,
    scale, threshold, keep_scale,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, SECOND: tl.constexpr,
    DIGESTS: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First pass over keys: delta, the sums of weights times their gradients, and share, those of
    the weights. SECOND: with delta known, the gradient of q."""
    d = tl.arange(0, BD)
    for start in range(0, n_keys, BK):
        j = start + tl.arange(0, BK)
        mask = (j < n_keys)[:, None] & (d < D)[None, :]
        k = tl.load(_rows(keys, j, stride, d), mask=mask, other=0.0)
        v = tl.load(_rows(values, j, stride, d), mask=mask, other=0.0)
        p, _, dp = _weights(
            q, k, v, do, bias, highest, weight, seed, unit, query_tile, head, i, j, first_key,
            n_keys, tokens, all_keys, prefix, grid_w, patches, scale, threshold, keep_scale,
            BQ, DIGESTS, HAS_BIAS, DROPOUT, PRECISION,
        )  # fmt: skip
        if SECOND:
            result += dot((p * (dp - delta[:, None])).to(k.dtype), k, PRECISION)
        else:
            delta += tl.sum(p * dp, 1)
            share += tl.sum(p, 1)
    return result, delta, share


@triton.jit
def _backward_rows(
    grad_out, qkv, digest_kv, table, digest_bias, seed, row_stats, grad_qkv, deltas,
    grad_stride_b, grad_stride_n, stride_b, stride_n, digest_stride_b, digest_stride_n,
    tokens, digests, prefix, grid_w, patches, query_tiles, scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    HAS_TABLE: tl.constexpr, HAS_DIGESTS: tl.constexpr, HAS_DIGEST_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of q, and deltas [B, heads, N, 2]: the sum over a row of weights times their
    gradients, and row_stats' factor, corrected. Grid as forward.

    Logits of thousands come out a little different from the forward's. A row of weights that sums
    to one again keeps the difference of two nearly equal gradients right.
    """
    C: tl.constexpr = HEADS * D
    head = tl.program_id(0) % HEADS
    query_tile = tl.program_id(0) // HEADS % query_tiles
    image = (tl.program_id(0) // (HEADS * query_tiles)).to(tl.int64)
    unit = image * HEADS + head
    i, d = query_tile * BQ + tl.arange(0, BQ), tl.arange(0, BD)
    mask = (i < tokens)[:, None] & (d < D)[None, :]
    base = qkv + image * stride_b + head * D
    extra = digest_kv + image * digest_stride_b + head * D
    q = tl.load(_rows(base, i, stride_n, d), mask=mask, other=0.0)
    grads = _rows(grad_out + image * grad_stride_b + head * D, i, grad_stride_n, d)
    do = tl.load(grads, mask=mask, other=0.0)
    stats = row_stats + (unit * tokens + i) * 2
    highest = tl.load(stats, mask=i < tokens, other=0.0)
    weight = tl.load(stats + 1, mask=i < tokens, other=0.0)
    delta = tl.zeros((BQ,), tl.float32)
    share = tl.zeros((BQ,), tl.float32)
    dq = tl.zeros((BQ, BD), tl.float32)
    for second in tl.static_range(2):
        dq, delta, share = _row_pass(
            q, do, dq, delta, share, base + C, base + 2 * C, stride_n, table, highest, weight, seed,
            unit, query_tile, head, i, 0, tokens, tokens, tokens + digests, prefix, grid_w, patches,
            scale, threshold, keep_scale, D, BQ, BK, BD, second == 1, False, HAS_TABLE, DROPOUT,
            PRECISION,
        )  # fmt: skip
        if HAS_DIGESTS:
            dq, delta, share = _row_pass(
                q, do, dq, delta, share, extra, extra + C, digest_stride_n, digest_bias, highest,
                weight, seed, unit, query_tile, head, i, tokens, digests, tokens, tokens + digests,
                prefix, grid_w, patches, scale, threshold, keep_scale, D, BQ, BK, BD, second == 1,
                True, HAS_DIGEST_BIAS, DROPOUT, PRECISION,
            )  # fmt: skip
        if second == 0:
            share = tl.where(i < tokens, share, 1.0)
            delta, weight = delta / share, weight / share
    to = _rows(grad_qkv + image * tokens * 3 * C + head * D, i, 3 * C, d)
    tl.store(to, (dq * scale).to(q.dtype), mask=mask)
    corrected = deltas + (unit * tokens + i) * 2
    tl.store(corrected, delta, mask=i < tokens)
    tl.store(corrected + 1, weight, mask=i < tokens)


@triton.jit
def _backward_columns(
    grad_out, qkv, digest_kv, table, digest_bias, seed, row_stats, deltas, grad_kv, digest_sums,
    grad_stride_b, grad_stride_n, stride_b, stride_n, digest_stride_b, digest_stride_n,
    tokens, digests, prefix, grid_w, patches, query_tiles, key_tiles, scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    HAS_TABLE: tl.constexpr, HAS_DIGESTS: tl.constexpr, HAS_DIGEST_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DIGESTS: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v of the tokens, or (DIGESTS) of the digests with digest_sums [B, heads,
    M], an image's share of their bias. Grid: images x key tiles x heads."""
    C: tl.constexpr = HEADS * D
    BIASED: tl.constexpr = HAS_DIGEST_BIAS if DIGESTS else HAS_TABLE
    head = tl.program_id(0) % HEADS
    j = tl.program_id(0) // HEADS % key_tiles * BK + tl.arange(0, BK)
    image = (tl.program_id(0) // (HEADS * key_tiles)).to(tl.int64)
    unit = image * HEADS + head
    d = tl.arange(0, BD)
    base = qkv + image * stride_b + head * D
    if DIGESTS:
        n_keys, first_key, bias = digests, tokens, digest_bias
        keys = _rows(digest_kv + image * digest_stride_b + head * D, j, digest_stride_n, d)
        to = _rows(grad_kv + image * digests * 2 * C + head * D, j, 2 * C, d)
    else:
        n_keys, first_key, bias = tokens, 0, table
        keys = _rows(base + C, j, stride_n, d)
        to = _rows(grad_kv + image * tokens * 3 * C + head * D + C, j, 3 * C, d)
    mask = (j < n_keys)[:, None] & (d < D)[None, :]
    k = tl.load(keys, mask=mask, other=0.0)
    v = tl.load(keys + C, mask=mask, other=0.0)
    dk = tl.zeros((BK, BD), tl.float32)
    dv = tl.zeros((BK, BD), tl.float32)
    bias_sum = tl.zeros((BK,), tl.float32)
    for query_tile in range(query_tiles):
        i = query_tile * BQ + tl.arange(0, BQ)
        there = (i < tokens)[:, None] & (d < D)[None, :]
        q = tl.load(_rows(base, i, stride_n, d), mask=there, other=0.0)
        grads = _rows(grad_out + image * grad_stride_b + head * D, i, grad_stride_n, d)
        do = tl.load(grads, mask=there, other=0.0)
        statistic = (unit * tokens + i) * 2
        highest = tl.load(row_stats + statistic, mask=i < tokens, other=0.0)
        delta = tl.load(deltas + statistic, mask=i < tokens, other=0.0)
        weight = tl.load(deltas + statistic + 1, mask=i < tokens, other=0.0)  # 0: no such row
        p, kept, dp = _weights(
            q, k, v, do, bias, highest, weight, seed, unit, query_tile, head, i, j, first_key,
            n_keys, tokens, tokens + digests, prefix, grid_w, patches, scale, threshold, keep_scale,
            BQ, DIGESTS, BIASED, DROPOUT, PRECISION,
        )  # fmt: skip
        ds = p * (dp - delta[:, None])
        dv += dot(tl.trans(kept.to(q.dtype)), do, PRECISION)
        dk += dot(tl.trans(ds.to(q.dtype)), q, PRECISION)
        bias_sum += tl.sum(ds, 0)
    tl.store(to, (dk * scale).to(k.dtype), mask=mask)
    tl.store(to + C, dv.to(k.dtype), mask=mask)
    if DIGESTS:
        tl.store(digest_sums + unit * digests + j, bias_sum, mask=j < digests)


@triton.jit
def _backward_table(
    grad_out, qkv, digest_kv, table, digest_bias, seed, row_stats, deltas, table_sums,
    grad_stride_b, grad_stride_n, stride_b, stride_n, digest_stride_b, digest_stride_n,
    tokens, digests, prefix, grid_w, patches, query_tiles, batch, per_program, bands,
    scale, threshold, keep_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    HAS_TABLE: tl.constexpr, HAS_DIGESTS: tl.constexpr, HAS_DIGEST_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Shares of the table's gradient: a band of ROWS grid rows of queries against one of keys.

    table_sums [shares, heads, bands, bands, 2 ROWS - 1, grid_w]: the gradients of their logits,
    summed over per_program images, then by dy within the bands and by |dx|. A band is one tile of
    BT tokens, or one grid row in several. Grid: shares x heads x bands x bands.
    """
    C: tl.constexpr = HEADS * D
    key_band = tl.program_id(0) % bands
    query_band = tl.program_id(0) // bands % bands
    head = tl.program_id(0) // (bands * bands) % HEADS
    first = tl.program_id(0) // (bands * bands * HEADS) * per_program
    d, t = tl.arange(0, BD), tl.arange(0, BT)
    bins = tl.arange(0, BW)
    to = table_sums + tl.program_id(0).to(tl.int64) * (2 * ROWS - 1) * grid_w + bins
    folded = tl.zeros((BW,), tl.float32)
    for query_start in range(0, ROWS * grid_w, BT):
        for key_start in range(0, ROWS * grid_w, BT):
            here, over = query_start + t, key_start + t  # places in the bands
            i = query_band * ROWS * grid_w + here
            j = key_band * ROWS * grid_w + over
            row, column = (here < ROWS * grid_w) & (i < patches), over < ROWS * grid_w
            column = column & (j < patches)
            i, j = prefix + i, prefix + j
            mask_i = row[:, None] & (d < D)[None, :]
            mask_j = column[:, None] & (d < D)[None, :]
            total = tl.zeros((BT, BT), tl.float32)
            for step in range(min(per_program, batch - first)):
                image = (first + step).to(tl.int64)
                unit = image * HEADS + head
                base = qkv + image * stride_b + head * D
                q = tl.load(_rows(base, i, stride_n, d), mask=mask_i, other=0.0)
                k = tl.load(_rows(base + C, j, stride_n, d), mask=mask_j, other=0.0)
                v = tl.load(_rows(base + 2 * C, j, stride_n, d), mask=mask_j, other=0.0)
                grads = _rows(grad_out + image * grad_stride_b + head * D, i, grad_stride_n, d)
                do = tl.load(grads, mask=mask_i, other=0.0)
                statistic = (unit * tokens + i) * 2
                highest = tl.load(row_stats + statistic, mask=row, other=0.0)
                delta = tl.load(deltas + statistic, mask=row, other=0.0)
                weight = tl.load(deltas + statistic + 1, mask=row, other=0.0)
                p, _, dp = _weights(
                    q, k, v, do, table, highest, weight, seed, unit, 0, head, i, j, 0,
                    tokens, tokens, tokens + digests, prefix, grid_w, patches, scale, threshold,
                    keep_scale, BT, False, True, False, PRECISION,
                )  # fmt: skip
                if DROPOUT:
                    dp *= _keep_rows(seed, unit, i, j, tokens + digests, threshold, keep_scale, BT)
                ds = p * (dp - delta[:, None])
                total += tl.where(row[:, None] & column[None, :], ds, 0.0)
            for place in range(2 * ROWS - 1):
                dy = place - (ROWS - 1)
                part = _fold(total, here, query_start - key_start, dy, bins, grid_w, -1, ROWS, BT)
                part += _fold(total, here, query_start - key_start, dy, bins, grid_w, 1, ROWS, BT)
                if ROWS == 1:
                    folded += part
                else:
                    tl.store(to + place * grid_w, part, mask=bins < grid_w)
    if ROWS == 1:
        tl.store(to, folded, mask=bins < grid_w)


@triton.jit
def _fold(
    total, here, ahead, dy, bins, grid_w, SIGN: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr
):
    """Sums of `total` over the pairs whose key stands dy rows below the query and bins columns to
    one side; `ahead`: from a place in the tile of keys to the same place in that of queries."""
    x = here[:, None] % grid_w + SIGN * bins[None, :]
    y = here // grid_w + dy
    key = here[:, None] + ahead + dy * grid_w + SIGN * bins[None, :]
    there = (x >= 0) & (x < grid_w) & ((y >= 0) & (y < ROWS) & (here < ROWS * grid_w))[:, None]
    there = there & (key >= 0) & (key < BT) & (bins < grid_w)[None, :]
    if SIGN > 0:  # dx = 0 counts once
        there = there & (bins > 0)[None, :]
    return tl.sum(tl.where(there, tl.gather(total, tl.where(there, key, 0), 1), 0.0), 0)


@triton.jit
def _keep_rows(seed, unit, i, j, all_keys, threshold, keep_scale, BT: tl.constexpr):
    """As `keep_weights`, for queries that need not begin a block of four: each of the BT has its
    own counter, of which it takes word i % 4."""
    words = keep_weights(seed, unit, i // 4, j, all_keys, threshold, keep_scale)  # [4 BT, BT]
    words = words.reshape(BT, 4, BT)
    mine = (tl.arange(0, 4)[None, :] == (i % 4)[:, None])[:, :, None]
    return tl.sum(tl.where(mine, words, 0.0), 1)


@triton.jit
def _sum_table(
    table_sums, grad_table, shares, bands, grid_h, grid_w,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BANDS: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """grad_table [heads, grid_h * grid_w]: a program adds up what all pairs of bands have for one
    head and |dy|."""
    head, distance = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    query_band = tl.arange(0, BANDS)[:, None]
    bins = tl.arange(0, BW)[None, :]
    total = tl.zeros((BANDS, BW), tl.float32)
    share_sums = table_sums + head * bands * bands * (2 * ROWS - 1) * grid_w + bins
    for _ in range(shares):
        for sign in tl.static_range(2):
            dy = distance if sign == 0 else -distance
            lower = (dy + grid_h * ROWS) // ROWS - grid_h  # rounds down, for negative dy too
            for nearer in tl.static_range(2):  # the two bands of keys that hold rows dy below
                key_band = query_band + lower + nearer
                within = dy - (lower + nearer) * ROWS
                there = (query_band < bands) & (key_band >= 0) & (key_band < bands)
                there = there & (bins < grid_w) & (within > -ROWS)
                if sign == 1:  # dy = 0 counts once
                    there = there & (distance > 0)
                pair = query_band * bands + key_band
                at = share_sums + (pair * (2 * ROWS - 1) + within + ROWS - 1) * grid_w
                total += tl.load(at, mask=there, other=0.0)
        share_sums += HEADS * bands * bands * (2 * ROWS - 1) * grid_w
    to = grad_table + (head * grid_h + distance) * grid_w + bins
    tl.store(to, tl.sum(total, 0)[None, :].to(grad_table.dtype.element_ty), mask=bins < grid_w)


def digest_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    digest_kv: Tensor | None,
    bias_table: Tensor | None,
    digest_bias: Tensor | None,
    row_stats: Tensor,
    seed: Tensor | None,
    num_heads: int,
    grid_h: int,
    grid_w: int,
    num_prefix_tokens: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, digest_kv and the two biases (empty where the argument is None)."""
    grad_out, qkv = _triton.dense(grad_out), _triton.dense(qkv)
    digest_kv = None if digest_kv is None else _triton.dense(digest_kv)
    grads = [
        qkv.new_zeros(0 if t is None else t.shape)
        for t in (qkv, digest_kv, bias_table, digest_bias)
    ]
    if qkv.numel():
        given = arguments(
            qkv, digest_kv, bias_table, digest_bias, row_stats, seed, num_heads, (grid_h, grid_w),
            num_prefix_tokens, scale, dropout_p, "backward_rows",
        )  # fmt: skip
        deltas = torch.empty_like(row_stats)
        strides = {"grad_stride_b": grad_out.stride(0), "grad_stride_n": grad_out.stride(1)}
        given |= {"grad_out": grad_out, "deltas": deltas, **strides}
        _launch(given, *grads)
    return grads[0], grads[1], grads[2], grads[3]


def _launch(
    given: dict[str, Any],
    grad_qkv: Tensor,
    grad_digest_kv: Tensor,
    grad_table: Tensor,
    grad_digest_bias: Tensor,
) -> None:
    """All kernels of a call with tokens; the gradients are written in place."""
    B, heads, M = grad_qkv.shape[0], given["HEADS"], given["digests"]

    def launch(kernel: Any, programs: int, **more: Any) -> None:
        _triton.launch(kernel, programs, problem(grad_qkv, heads), **given, **more)

    launch(_backward_rows, B * given["query_tiles"] * heads, grad_qkv=grad_qkv)
    digest_sums = torch.empty(B, heads, M, dtype=torch.float32, device=grad_qkv.device)
    for digests, grad, count in ((False, grad_qkv, given["tokens"]), (True, grad_digest_kv, M)):
        tiles = -(-count // given["BK"])
        if tiles:
            more = {"key_tiles": tiles, "DIGESTS": digests, "digest_sums": digest_sums}
            launch(_backward_columns, B * tiles * heads, grad_kv=grad, **more)
    if given["HAS_DIGEST_BIAS"] and M:
        grad_digest_bias.copy_(digest_sums.sum(0))
    if given["HAS_TABLE"]:
        _launch_table(launch, given, grad_table, problem(grad_qkv, heads), B)


def _launch_table(
    launch: Any, given: dict[str, Any], grad_table: Tensor, of: _tiles.Problem, batch: int
) -> None:
    """The gradient of the relative table [heads, grid_h * grid_w]."""
    heads, grid_w = grad_table.shape[0], given["grid_w"]
    grid_h = grad_table.shape[1] // grid_w
    edge = _triton.shape(of, "backward_table", grad_table.device).edge  # tokens of a band
    rows = max(1, min(edge // grid_w, ROWS, grid_h))
    bands = -(-grid_h // rows)
    per_program = -(-batch // min(batch, IMAGES))
    shares = -(-batch // per_program)
    shape = (shares, heads, bands, bands, 2 * rows - 1, grid_w)
    sums = torch.empty(shape, dtype=torch.float32, device=grad_table.device)
    sizes = {"bands": bands, "ROWS": rows, "BW": _triton.power_of_two(grid_w)}
    tile = min(edge, _triton.power_of_two(rows * grid_w))
    programs = shares * heads * bands * bands
    more = {"batch": batch, "per_program": per_program, "BT": tile, "table_sums": sums}
    launch(_backward_table, programs, **more, **sizes)
    sizes |= {"shares": shares, "grid_h": grid_h, "grid_w": grid_w, "HEADS": heads}
    sizes["BANDS"] = triton.next_power_of_2(bands)
    tables: dict[str, Any] = {"table_sums": sums, "grad_table": grad_table}
    _triton.launch(_sum_table, heads * grid_h, of, **tables, **sizes)


register_triton("digest_bwd", digest_bwd)
