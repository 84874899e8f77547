"""IPSA in plain PyTorch: windows by permutation, with three ways to attend."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_ops.benchmarks.baselines.plain import Plain

Core = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> weighted v


def relative_index(rows: int, columns: int) -> Tensor:
    """[N, N]: which row of the bias table query i and key j take."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1


def gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """[(2h-1)(2w-1), heads] and [N, N] -> dense bias [heads, N, N]."""
    tokens = index.shape[0]
    return table[index.flatten()].view(tokens, tokens, -1).permute(2, 0, 1)


def windows_of(qkv: Tensor, heads: int, window: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, W, 3C] -> q, k, v, each [B * windows, heads, N, D]."""
    batch, height, width, _ = qkv.shape
    rows, columns = window
    grid = qkv.reshape(batch, height // rows, rows, width // columns, columns, 3, heads, -1)
    # -> [3, B, gh, gw, heads, rows, columns, D]
    q, k, v = grid.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(1, 3).flatten(3, 4).unbind(0)
    return q, k, v


def map_of(windows: Tensor, size: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """[B * windows, heads, N, D] -> [B, H, W, heads * D]."""
    (height, width), (rows, columns) = size, window
    _, heads, _, dim = windows.shape
    grid = windows.view(-1, height // rows, width // columns, heads, rows, columns, dim)
    return grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, height, width, heads * dim)


def eager_core(bias: Tensor) -> Core:
    """softmax(q k^T / sqrt(D) + bias) v, as the official code of CAT has it."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        return logits.softmax(-1) @ v

    return core


def sdpa_core(bias: Tensor) -> Core:
    """scaled_dot_product_attention with the bias as a dense mask."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = bias.expand(q.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return core


def flex_core(bias: Tensor) -> Core:
    """flex_attention with the bias as a score_mod; it has no backward on the CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    def with_bias(score: Tensor, _: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[head, i, j]

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex_attention(q, k, v, score_mod=with_bias)
        assert isinstance(out, Tensor)
        return out

    return core


def ipsa_dense(make_core: Callable[[Tensor], Core], heads: int, window: tuple[int, int]) -> Plain:
    """IPSA on (qkv [B, H, W, 3C], bias [heads, N, N]): for inference it is gathered once."""

    def ipsa(qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = windows_of(qkv, heads, window)
        size = (qkv.shape[1], qkv.shape[2])
        return map_of(make_core(bias)(q, k, v), size, window)

    return ipsa


def ipsa_table(make_core: Callable[[Tensor], Core], heads: int, window: tuple[int, int]) -> Plain:
    """IPSA on (qkv, table [(2h-1)(2w-1), heads]): a training step owes the table its gradient."""
    index = relative_index(*window)
    dense = ipsa_dense(make_core, heads, window)

    def ipsa(qkv: Tensor, table: Tensor) -> Tensor:
        return dense(qkv, gather_bias(table, index))

    return ipsa
