"""Conv-relative attention with its linear layers, and the module of the position encoding."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._linear import linear
from .interface import conv_position_encoding, conv_relative_attention

COAT_WINDOWS: Mapping[int, int] = MappingProxyType({3: 2, 5: 3, 7: 3})  # window -> heads


class ConvRelativePosition(nn.Module):
    """The kernels of the relative term, `conv_list`: one depthwise convolution for each window.

    It computes nothing by itself. The blocks of a scale share one (CoaT, 4.2).

    Args:
        dim: channels; num_heads divides it.
        windows: size of a window -> how many heads have it; consecutive heads, in this order.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, windows: Mapping[int, int] = COAT_WINDOWS
    ) -> None:
        super().__init__()
        head_dim = _checks.divides("num_heads", num_heads, "dim", _checks.integer("dim", dim, 1))
        for window, heads in windows.items():
            _checks.odd("windows", window)
            _checks.integer(f"windows[{window}]", heads, 1)
        if sum(windows.values()) != num_heads:
            raise ValueError(
                f"windows must share out num_heads = {num_heads} heads, got {dict(windows)}"
            )
        self.conv_list = nn.ModuleList(
            _depthwise(heads * head_dim, window) for window, heads in windows.items()
        )

    def tensors(self) -> tuple[list[Any], list[Any]]:
        """The weights and the biases, as `conv_relative_attention` takes them."""
        return [conv.weight for conv in self.conv_list], [conv.bias for conv in self.conv_list]


class ConvRelativeAttention(nn.Module):
    """y = proj(conv_relative_attention(qkv(x))), CoaT's: x [B, N, dim] -> [B, N, dim].

    Args:
        dim: channels; num_heads divides it.
        windows: of the relative term: size of a window -> how many heads have it, in this order;
            {} for no relative term.
        num_prefix_tokens: tokens before the image, such as CLS.
        qkv_bias: whether the qkv layer has a bias.
        scale: factor on the first term; None: (dim / num_heads) ** -0.5.
        proj_drop: dropout in training, on the output.
        relative: kernels shared with other modules, in place of own ones made after `windows`.
        backend: of the attention; None: the first that can.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        windows: Mapping[int, int] = COAT_WINDOWS,
        num_prefix_tokens: int = 1,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        relative: ConvRelativePosition | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _checks.divides("num_heads", num_heads, "dim", _checks.integer("dim", dim, 1))
        if relative is None and windows:
            relative = ConvRelativePosition(dim, num_heads, windows)
        self.num_heads = num_heads
        self.num_prefix_tokens = _checks.integer("num_prefix_tokens", num_prefix_tokens, 0)
        self.scale = scale
        self.proj_drop = _checks.probability("proj_drop", proj_drop)
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.crpe = relative  # the checkpoints' name
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        weights, biases = self.crpe.tensors() if self.crpe is not None else ([], [])
        out = conv_relative_attention(
            linear(x, self.qkv.weight, self.qkv.bias),
            weights,
            biases,
            num_heads=self.num_heads,
            grid=grid,
            num_prefix_tokens=self.num_prefix_tokens,
            scale=self.scale,
            backend=self.backend,
        )
        out = linear(out, self.proj.weight, self.proj.bias)
        return F.dropout(out, self.proj_drop, self.training)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_prefix_tokens={self.num_prefix_tokens}"


class ConvPositionEncoding(nn.Module):
    """y = conv_position_encoding(x) with the kernel `proj`: x [B, N, dim] -> [B, N, dim].

    Args:
        dim: channels.
        window: size of the kernel, odd.
        num_prefix_tokens: tokens before the image, such as CLS, which pass unchanged.
        backend: of the encoding; None: the first that can.
    """

    def __init__(
        self, dim: int, window: int = 3, num_prefix_tokens: int = 1, backend: str | None = None
    ) -> None:
        super().__init__()
        self.proj = _depthwise(_checks.integer("dim", dim, 1), _checks.odd("window", window))
        self.num_prefix_tokens = _checks.integer("num_prefix_tokens", num_prefix_tokens, 0)
        self.backend = backend

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return conv_position_encoding(
            x,
            self.proj.weight,
            self.proj.bias,
            grid=grid,
            num_prefix_tokens=self.num_prefix_tokens,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"num_prefix_tokens={self.num_prefix_tokens}"


def _depthwise(channels: int, window: int) -> nn.Conv2d:
    """A depthwise convolution that keeps the size of the map; holds the parameters alone."""
    return nn.Conv2d(channels, channels, window, padding=window // 2, groups=channels)
