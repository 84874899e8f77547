"""CPSA in plain PyTorch: each channel's patches as tokens, with two ways to attend."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from xattn_ops.benchmarks.baselines.plain import Plain


def cpsa(attend: Callable[[Tensor, Tensor, Tensor], Tensor], patch: tuple[int, int]) -> Plain:
    """CPSA, single head, on (x [B, H, W, C], qkv_weight, qkv_bias, proj_weight, proj_bias)."""
    rows, columns = patch

    def module(
        x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
    ) -> Tensor:
        batch, height, width, channels = x.shape
        gh, gw = height // rows, width // columns
        grid = x.reshape(batch, gh, rows, gw, columns, channels).permute(0, 5, 1, 3, 2, 4)
        tokens = grid.reshape(batch * channels, gh * gw, rows * columns)
        q, k, v = F.linear(tokens, qkv_weight, qkv_bias).chunk(3, -1)
        out = F.linear(attend(q, k, v), proj_weight, proj_bias)
        grid = out.view(batch, channels, gh, gw, rows, columns).permute(0, 2, 4, 3, 5, 1)
        return grid.reshape(batch, height, width, channels)

    return module


def attend_eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Single-head attention over [units, T, P], spelled out."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same through scaled_dot_product_attention, which wants a head axis."""
    out = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1))
    return out.squeeze(1)
