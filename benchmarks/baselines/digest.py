"""Digest attention in plain PyTorch: keys and values concatenated, the bias dense.

`make_core` is one of IPSA's: eager_core or sdpa_core, which take the bias [heads, N, N + M].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xattn_ops.benchmarks.baselines.ipsa import Core
from xattn_ops.benchmarks.baselines.plain import Plain


def offset_index(grid: tuple[int, int]) -> Tensor:
    """[N, N]: which column of the bias table query i and key j take, |dy| * gw + |dx|."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y).abs() * columns + (x[:, None] - x).abs()


def dense_digest_bias(table: Tensor, digest_bias: Tensor, index: Tensor) -> Tensor:
    """[heads, N] by offset and [heads, M] -> [heads, N, N + M]."""
    of_digests = digest_bias[:, None].expand(-1, index.shape[0], -1)
    return torch.cat((table[:, index], of_digests), 2)


def digest_dense(make_core: Callable[[Tensor], Core], heads: int) -> Plain:
    """On (qkv [B, N, 3C], digest_kv [B, M, 2C], bias): for inference it is gathered once."""

    def digest(qkv: Tensor, digest_kv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        far_k, far_v = digest_kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = make_core(bias)(q, torch.cat((k, far_k), 2), torch.cat((v, far_v), 2))
        return out.transpose(1, 2).flatten(2)

    return digest


def digest_table(make_core: Callable[[Tensor], Core], heads: int, grid: tuple[int, int]) -> Plain:
    """On (qkv, digest_kv, table [heads, N], digest_bias [heads, M]): a step owes both gradients."""
    index, dense = offset_index(grid), digest_dense(make_core, heads)

    def digest(qkv: Tensor, digest_kv: Tensor, table: Tensor, digest_bias: Tensor) -> Tensor:
        return dense(qkv, digest_kv, dense_digest_bias(table, digest_bias, index))

    return digest
