"""Conv-relative attention and the conv position encoding: the equations, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_relative_attention_reference(
    qkv: Tensor,
    conv_weights: Sequence[Tensor],
    conv_biases: Sequence[Tensor | None] | None = None,
    *,
    num_heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int = 1,
    scale: float | None = None,
) -> Tensor:
    """`conv_relative_attention` on any device and in any dtype, differentiable twice."""
    P, D = num_prefix_tokens, qkv.shape[-1] // 3 // num_heads
    scale = D**-0.5 if scale is None else scale

    # [B, N, 3C] -> 3 x [B, heads, N, D]
    q, k, v = qkv.unflatten(-1, (3, num_heads, D)).permute(2, 0, 3, 1, 4)
    out = scale * (q @ (k.softmax(-2).mT @ v))
    out = out.transpose(1, 2).flatten(2)  # [B, N, C]
    if not conv_weights:
        return out

    q, _, v = qkv[:, P:].chunk(3, -1)  # image tokens, [B, H W, C]
    groups = v.mT.unflatten(-1, grid).split([w.shape[0] for w in conv_weights], 1)
    biases = conv_biases or [None] * len(conv_weights)
    parts = [
        depthwise_convolution(*group) for group in zip(groups, conv_weights, biases, strict=True)
    ]
    relative = q * torch.cat(parts, 1).flatten(2).mT
    return out + F.pad(relative, (0, 0, P, 0))


def conv_position_encoding_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    num_prefix_tokens: int = 1,
) -> Tensor:
    """`conv_position_encoding` on any device and in any dtype, differentiable twice."""
    P = num_prefix_tokens
    image = x[:, P:].mT.unflatten(-1, grid)  # [B, C, H, W]
    encoding = depthwise_convolution(image, weight, bias).flatten(2).mT
    return (x + F.pad(encoding, (0, 0, P, 0))).contiguous()


def depthwise_convolution(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, C, H, W] of the same size, zeros beyond the edges; weight [C, 1, k, k] with odd k."""
    C, _, k, _ = weight.shape
    return F.conv2d(image, weight, bias, padding=k // 2, groups=C)
