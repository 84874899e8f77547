"""CoaT's conv position encoding in plain PyTorch, in two layouts.

Both take (x [B, N, C], weight [C, 1, k, k], bias [C]).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_ops.benchmarks.baselines.plain import Plain


def convpos_eager(grid: tuple[int, int], prefix: int = 1) -> Plain:
    """As the official code of CoaT has it: two transposes around a convolution of [B, C, H, W]."""

    def convpos(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        first, tokens = x[:, :prefix], x[:, prefix:]
        image = tokens.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
        image = image + _depthwise(image, weight, bias)
        return torch.cat((first, image.flatten(2).transpose(1, 2)), 1)

    return convpos


def convpos_nhwc(grid: tuple[int, int], prefix: int = 1) -> Plain:
    """As a careful user would: the tokens are a map in channels-last memory already."""

    def convpos(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        first, tokens = x[:, :prefix], x[:, prefix:]
        image = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        around = _depthwise(image, weight, bias).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat((first, tokens + around), 1)

    return convpos


def _depthwise(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
