"""Digest-token attention: the equation, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dropout import draw_seed, keep_mask


def digest_attention_reference(
    qkv: Tensor,
    digest_kv: Tensor | None = None,
    bias_table: Tensor | None = None,
    digest_bias: Tensor | None = None,
    *,
    num_heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`digest_attention` on any device and in any dtype, differentiable twice.

    seed: int64 scalar that fixes the dropout mask; None draws one.
    """
    B, N, C3 = qkv.shape
    C, D = C3 // 3, C3 // 3 // num_heads
    scale = D**-0.5 if scale is None else scale

    # [B, N, 3, heads, D] -> 3 x [B, heads, N, D]; keys are the tokens, then the digests
    q, k, v = qkv.reshape(B, N, 3, num_heads, D).permute(2, 0, 3, 1, 4)
    M = 0
    if digest_kv is not None:
        M = digest_kv.shape[1]
        dk, dv = digest_kv.reshape(B, M, 2, num_heads, D).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([k, dk], 2), torch.cat([v, dv], 2)

    logits = scale * (q @ k.mT)  # [B, heads, N, N + M]
    if bias_table is not None:
        relative = bias_table[:, relative_index(grid, qkv.device)]  # [heads, gh gw, gh gw]
        before = (num_prefix_tokens, M, num_prefix_tokens, 0)
        logits = logits + torch.nn.functional.pad(relative, before)
    if digest_bias is not None:
        logits = logits + torch.nn.functional.pad(digest_bias, (N, 0))[:, None]
    weights = logits.softmax(-1)
    if dropout_p > 0:
        seed = draw_seed(qkv.device) if seed is None else seed
        keep = keep_mask(seed, B * num_heads, N, N + M, dropout_p)
        weights = weights * keep.view(weights.shape) / (1 - dropout_p)
    return (weights @ v).transpose(1, 2).reshape(B, N, C)


def relative_index(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Column |dy| * gw + |dx| of the table for each query and key: [gh gw, gh gw]."""
    gh, gw = grid
    y, x = torch.arange(gh * gw, device=device) // gw, torch.arange(gh * gw, device=device) % gw
    return (y[:, None] - y).abs() * gw + (x[:, None] - x).abs()
