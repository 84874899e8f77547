"""Token merge and enhancement with its weights and its batch norm."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from .._batch_norm import BatchNorm1d
from .merge_interface import token_merge_enhance


class TokenMergeEnhance(nn.Module):
    """The TME of a CabViT block: x [B, N, dim] -> (digests [B, m, dim], tokens [B, N, dim]).

    digests = DWConv(x), with a stride; tokens = BN(DWConv(x)), without a residual, as in the
    official code, whose names the parameters carry. In training the batch norm's statistics are
    those of all tokens of the grid; in eval mode it is folded into the convolution's weight and
    bias, and gradients pass through the folding. Prefix tokens pass unchanged.

    Args:
        dim: channels.
        merge: whether there are digests, else None in their place; the last block of a stage needs
            none.
        window: k of the merge, odd.
        stride: of the merge; m = ceil(gh / stride) * ceil(gw / stride).
        enhance_window: k of the enhancement, odd.
        num_prefix_tokens: how many tokens, such as a class token, precede the grid.
        backend: of the convolutions; None: the first that can.
    """

    def __init__(
        self,
        dim: int,
        *,
        merge: bool = True,
        window: int = 7,
        stride: int = 4,
        enhance_window: int = 3,
        num_prefix_tokens: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _checks.integer("dim", dim, 1)
        _checks.odd("window", window)
        _checks.odd("enhance_window", enhance_window)
        self.stride = _checks.integer("stride", stride, 1)
        self.num_prefix_tokens = _checks.integer("num_prefix_tokens", num_prefix_tokens, 0)
        self.backend = backend
        self.dw_conv = _depthwise(dim, window, stride) if merge else None
        # Over rows of channels, which is what tokens are.
        norm = BatchNorm1d(dim)
        self.local_conv = nn.Sequential(OrderedDict(c=_depthwise(dim, enhance_window, 1), bn=norm))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
        local: Any = self.local_conv
        conv, norm = local.c, local.bn
        weight, bias = (conv.weight, None) if norm.training else fold(conv.weight, norm)
        digests, tokens = token_merge_enhance(
            x,
            None if self.dw_conv is None else self.dw_conv.weight,
            weight,
            bias,
            grid=grid,
            stride=self.stride,
            num_prefix_tokens=self.num_prefix_tokens,
            backend=self.backend,
        )
        if not norm.training:
            return digests, tokens
        prefix, image = tokens.tensor_split([self.num_prefix_tokens], 1)
        image = norm(image.flatten(0, 1)).view(image.shape)
        return digests, torch.cat([prefix, image], 1) if self.num_prefix_tokens else image

    def extra_repr(self) -> str:
        return f"stride={self.stride}, num_prefix_tokens={self.num_prefix_tokens}"


def fold(weight: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight [C, 1, k, k] and bias [C] of norm(DWConv(x)), a batch norm in eval mode.

    Computed in float32 at least, in the dtype of the weight; differentiable.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = norm.weight.to(wide) * torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    bias = torch.addcmul(norm.bias.to(wide), norm.running_mean.to(wide), scale, value=-1)
    return (weight.to(wide) * scale.view(-1, 1, 1, 1)).to(weight.dtype), bias.to(weight.dtype)


def _depthwise(channels: int, window: int, stride: int) -> nn.Conv2d:
    """Holds the weight alone."""
    return nn.Conv2d(
        channels, channels, window, stride, padding=window // 2, groups=channels, bias=False
    )
