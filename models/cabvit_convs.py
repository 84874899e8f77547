"""Stems and downsampling of CabViT (paper, 3.2), and ConvNeXt's, from which table 4 sets out.

Activations are maps [B, H, W, C]. In evaluation a BatchNorm is folded into the convolution before
it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_ops._batch_norm import BatchNorm2d
from xattn_ops._linear import linear
from xattn_ops.digest.merge_module import fold
from xattn_ops.models.layers import norm_layer, pad_to_multiple


class ConvNorm(nn.Module):
    """BN(conv(x)), the convolution padded to keep the size and without a bias: maps to maps."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.c = nn.Conv2d(channels, dim, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        if not self.bn.training:
            return self._convolved(x, *fold(self.c.weight, self.bn))
        x = self._convolved(x, self.c.weight, None)
        return self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = self.c
        if conv.kernel_size == (1, 1):
            return linear(x, weight.flatten(1), bias)
        x, padding = x.permute(0, 3, 1, 2), conv.kernel_size[0] // 2
        if bias is not None:
            # which an image is not, and which is faster; but oneDNN's sums err twice as much then,
            # and a training step would err too much by that
            x = x.contiguous(memory_format=torch.channels_last)
        if x.dtype == torch.bfloat16 and conv.groups > 1:
            # torch 2.13 leaves parts of the bfloat16 gradient of a strided depthwise weight
            # uninitialised on tiny maps where it pads by itself
            x, padding = F.pad(x, (padding,) * 4), 0
        return F.conv2d(x, weight, bias, conv.stride, padding, 1, conv.groups).permute(0, 2, 3, 1)


class ConvStem(nn.Module):
    """[B, H, W, 3] -> [B, ceil(H/4), ceil(W/4), dim] by two convolutions of 3x3 and stride 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        first, second = ConvNorm(3, dim // 2, 3, 2), ConvNorm(dim // 2, dim, 3, 2)
        self.seq = nn.Sequential(first, nn.GELU(), second)

    def forward(self, image: Tensor) -> Tensor:
        return self.seq(image)


class ConvDownsample(nn.Module):
    """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), dim]: 1x1, depthwise 3x3 of stride 2, 1x1."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, dim, 1)
        self.conv2 = ConvNorm(dim, dim, 3, 2, dim)
        self.conv3 = ConvNorm(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class PatchStem(nn.Module):
    """[B, H, W, 3] -> [B, ceil(H/4), ceil(W/4), dim]: ConvNeXt's, 4x4 patches and LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 4, 4)
        self.norm = norm_layer(dim)

    def forward(self, image: Tensor) -> Tensor:
        x = pad_to_multiple(image, 4).permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchDownsample(nn.Module):
    """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), dim]: ConvNeXt's, LayerNorm and 2x2 patches."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.norm = norm_layer(channels)
        self.proj = nn.Conv2d(channels, dim, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(self.norm(x), 2).permute(0, 3, 1, 2)
        return self.proj(x).permute(0, 2, 3, 1)


class PatchProjection(nn.Module):
    """[B, 3, H, W] -> [B, H // patch, W // patch, dim]: DeiT's, whole patches projected."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).permute(0, 2, 3, 1)


EMBEDS: dict[str, tuple[Any, Any]] = {
    "conv": (ConvStem, ConvDownsample),
    "patch": (PatchStem, PatchDownsample),
}
