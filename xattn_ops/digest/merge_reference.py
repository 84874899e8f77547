"""Token merge and enhancement: the equations, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_merge_enhance_reference(
    x: Tensor,
    merge_weight: Tensor | None,
    enhance_weight: Tensor,
    enhance_bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    stride: int = 4,
    num_prefix_tokens: int = 0,
) -> tuple[Tensor | None, Tensor]:
    """`token_merge_enhance` on any device and in any dtype, differentiable twice."""
    P = num_prefix_tokens
    image = x[:, P:].mT.unflatten(-1, grid)  # [B, C, gh, gw]
    enhanced = _depthwise(image, enhance_weight, enhance_bias, 1)
    enhanced = torch.cat([x[:, :P], enhanced], 1)
    if merge_weight is None:
        return None, enhanced
    return _depthwise(image, merge_weight, None, stride).contiguous(), enhanced


def _depthwise(image: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """[B, C, gh, gw] -> [B, ceil(gh / stride) * ceil(gw / stride), C]; weight [C, 1, k, k]."""
    C, _, k, _ = weight.shape
    # The zeros beyond the edges are put there: with conv2d's own padding torch 2.13 leaves parts
    # of the bfloat16 gradient of a strided depthwise weight uninitialised on tiny maps.
    image = F.pad(image, (k // 2,) * 4)
    return F.conv2d(image, weight, bias, stride, groups=C).flatten(2).mT
