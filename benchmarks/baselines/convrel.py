"""Factorised attention with the convolutional relative term in plain PyTorch, in two layouts.

Both take (qkv [B, N, 3C], weights [C_g, 1, k, k] of each channel group, then their biases [C_g]).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_ops.benchmarks.baselines.plain import Plain


def convrel_eager(heads: int, grid: tuple[int, int], prefix: int = 1) -> Plain:
    """As the official code of CoaT has it: heads ahead of tokens, the map as [B, C, H, W]."""
    height, width = grid

    def convrel(qkv: Tensor, *conv: Tensor) -> Tensor:
        batch, tokens, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        dim = channels // heads
        q, k, v = qkv.reshape(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        factor = q @ (k.softmax(2).transpose(-2, -1) @ v)  # [B, heads, N, D]
        image = v[:, :, prefix:].transpose(-2, -1).reshape(batch, channels, height, width)
        around = convolved(image, conv).view(batch, heads, dim, height * width)
        relative = q[:, :, prefix:] * around.transpose(-2, -1)
        zero = qkv.new_zeros(batch, heads, prefix, dim)
        out = dim**-0.5 * factor + torch.cat((zero, relative), 2)
        return out.transpose(1, 2).reshape(batch, tokens, channels)

    return convrel


def convrel_nhwc(heads: int, grid: tuple[int, int], prefix: int = 1) -> Plain:
    """As a careful user would: tokens stay [B, N, C], which is a map in channels-last memory."""
    height, width = grid

    def convrel(qkv: Tensor, *conv: Tensor) -> Tensor:
        batch, tokens, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q, k, v = qkv.unflatten(-1, (3, channels)).unbind(2)  # [B, N, C]
        qh, kh, vh = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        context = kh.softmax(2).transpose(-2, -1) @ vh * (channels // heads) ** -0.5
        out = (qh @ context).transpose(1, 2).reshape(batch, tokens, channels)
        image = v[:, prefix:].reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        around = convolved(image, conv).permute(0, 2, 3, 1).reshape(batch, -1, channels)
        out[:, prefix:].addcmul_(q[:, prefix:], around)  # in place: a tenth faster than a sum
        return out

    return convrel


def convolved(image: Tensor, conv: tuple[Tensor, ...]) -> Tensor:
    """Depthwise convolutions of consecutive channel groups of [B, C, H, W], in its memory format.

    conv: a weight [C_g, 1, k, k] of each group, then a bias [C_g] of each.
    """
    weights, biases = conv[: len(conv) // 2], conv[len(conv) // 2 :]
    groups = image.split([weight.shape[0] for weight in weights], 1)
    return torch.cat(
        [
            F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
            for x, weight, bias in zip(groups, weights, biases, strict=True)
        ],
        1,
    )
