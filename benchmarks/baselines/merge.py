"""CabViT's token merge and enhancement in plain PyTorch, in two layouts.

Both take (x [B, N, C], merge weight [C, 1, k, k], enhance weight [C, 1, k, k], bias [C]) and give
(digests [B, m, C], enhanced [B, N, C]).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from xattn_ops.benchmarks.baselines.plain import Several


def merge_eager(grid: tuple[int, int], stride: int = 4) -> Several:
    """As the official code of CabViT has it: two convolutions of [B, C, gh, gw]."""

    def merge(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
        return _convolved(image, stride, *weights)

    return merge


def merge_nhwc(grid: tuple[int, int], stride: int = 4) -> Several:
    """As a careful user would: the tokens are a map in channels-last memory already."""

    def merge(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return _convolved(x.unflatten(1, grid).permute(0, 3, 1, 2), stride, *weights)

    return merge


def _convolved(
    image: Tensor, stride: int, merge_weight: Tensor, enhance_weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    digests = _depthwise(image, merge_weight, None, stride)
    return _tokens(digests), _tokens(_depthwise(image, enhance_weight, bias, 1))


def _depthwise(image: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    padding = weight.shape[-1] // 2
    return F.conv2d(image, weight, bias, stride, padding, groups=weight.shape[0])


def _tokens(image: Tensor) -> Tensor:
    """[B, C, gh, gw] -> [B, gh gw, C], which shares the map's memory."""
    return image.flatten(2).transpose(1, 2)
