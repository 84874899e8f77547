"""Who looks at whom: one row of the map that the factorised form never stores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from .interface import check_attention


def conv_relative_attention_map(
    qkv: Tensor,
    conv_weights: Sequence[Tensor],
    conv_biases: Sequence[Tensor | None] | None = None,
    *,
    num_heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int = 1,
    scale: float | None = None,
    query: int = 0,
) -> Tensor:
    """How much one query takes of every token's value, in plain PyTorch.

    Row `query` of M = scale * Q softmax(K)^T, with out = M V the first term of
    `conv_relative_attention` (CoaT, Xu et al. 2021, 7). To a query in the image comes the relative
    map E (eq. 7). E differs from channel to channel, so its mean over the head's channels is taken;
    the bias multiplies no value and does not enter.

    Args:
        qkv, conv_weights, conv_biases, num_heads, grid, num_prefix_tokens, scale: of
            `conv_relative_attention`.
        query: its place among the tokens; 0 is CLS where there is one.

    Returns:
        [B, num_heads, N]; entries may be negative. Differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range.
    """
    options = (num_heads, grid, num_prefix_tokens, scale)
    rows, columns, prefix, scale = check_attention(qkv, conv_weights, conv_biases, *options)
    N, C3 = qkv.shape[1:]
    if _checks.integer("query", query, 0) >= N:
        raise ValueError(f"query must be less than the number of tokens, {N}, got {query}")
    D = C3 // 3 // num_heads

    q, k, _ = qkv.unflatten(-1, (3, num_heads, D)).unbind(2)  # [B, N, heads, D]
    q = q[:, query]  # [B, heads, D]
    row = scale * torch.einsum("bhd,bnhd->bhn", q, k.softmax(1))
    if query < prefix or not conv_weights:
        return row
    y, x = divmod(query - prefix, columns)
    placed = [_centred(w[:, 0], y, x, rows, columns) for w in conv_weights]
    encoding = torch.cat(placed).view(num_heads, D, rows * columns)
    relative = torch.einsum("bhd,hdn->bhn", q, encoding) / D
    return row + F.pad(relative, (prefix, 0))


def _centred(kernel: Tensor, y: int, x: int, rows: int, columns: int) -> Tensor:
    """[C, k, k] -> [C, rows, columns]: the kernel around (y, x), zeros elsewhere."""
    r = kernel.shape[-1] // 2
    # negative padding crops what lies beyond the edges
    return F.pad(kernel, (x - r, columns - 1 - x - r, y - r, rows - 1 - y - r))
