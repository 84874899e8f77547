"""Attention weights in plain PyTorch: slow, dense and easy to read, for pictures and for tests.

The fused kernels never form these weights, so they are computed again from what entered a module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_ops import CrossPatchAttention, InnerPatchAttention


@torch.no_grad()
def inner_patch_weights(module: InnerPatchAttention, x: Tensor) -> Tensor:
    """Who looks at whom inside each window.

    Args:
        module: without a shift.
        x: [B, H, W, C], what entered the module.

    Returns:
        [B, window rows, window columns, heads, N, N]; the last axis sums to 1.
    """
    if any(module.shift):
        raise ValueError(f"attention maps are drawn without a shift, got {module.shift}")
    rows, columns = module.window
    x = _padded(x, rows, columns)
    batch, height, width, channels = x.shape
    heads = module.num_heads
    qkv = F.linear(x, module.qkv.weight, module.qkv.bias)
    windows = qkv.view(
        batch, height // rows, rows, width // columns, columns, 3, heads, channels // heads
    )
    # -> q, k of [B, gh, gw, heads, N, D]
    q, k, _ = windows.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).unbind(0)
    scale = (channels // heads) ** -0.5 if module.scale is None else module.scale
    logits = scale * q @ k.transpose(-2, -1) + _relative_bias(module)
    return logits.softmax(-1)


@torch.no_grad()
def cross_patch_weights(module: CrossPatchAttention, x: Tensor) -> Tensor:
    """Which patches of its own channel each patch looks at, averaged over the heads.

    Args:
        x: [B, H, W, C], what entered the module.

    Returns:
        [B, C, T, T] for T patches, row-major; the last axis sums to 1.
    """
    rows, columns = module.patch
    x = _padded(x, rows, columns)
    batch, height, width, channels = x.shape
    patches = x.view(batch, height // rows, rows, width // columns, columns, channels)
    tokens = patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, -1, rows * columns)
    qkv = F.linear(tokens, module.qkv.weight, module.qkv.bias)
    dim = rows * columns // module.num_heads
    # [B, C, T, (3, heads, D)] -> q, k of [B, C, heads, T, D]
    q, k, _ = qkv.unflatten(-1, (3, module.num_heads, dim)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    scale = dim**-0.5 if module.scale is None else module.scale
    return (scale * q @ k.transpose(-2, -1)).softmax(-1).mean(2)


def _relative_bias(module: InnerPatchAttention) -> Tensor:
    """[heads, N, N] from the table: one row for each offset of query and key."""
    rows, columns = module.window
    table = module.relative_position_bias_table.view(2 * rows - 1, 2 * columns - 1, -1)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dense = table[y[:, None] - y + rows - 1, x[:, None] - x + columns - 1]  # [N, N, heads]
    return dense.permute(2, 0, 1)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[2] % columns, 0, -x.shape[1] % rows))
