"""Cases of conv_relative_attention and of conv_position_encoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.cases import Case
from xattn_ops import conv_position_encoding, conv_relative_attention
from xattn_ops.convrel import conv_position_encoding_reference, conv_relative_attention_reference


def by_name(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` with its lists spelled out: weight_0, weight_1, ... and bias_0, bias_1, ..."""

    def call(qkv: Tensor, **arguments: Any) -> Tensor:
        weights = [a for name, a in arguments.items() if name.startswith("weight_")]
        biases = [a for name, a in arguments.items() if name.startswith("bias_")]
        options = {
            name: a
            for name, a in arguments.items()
            if not name.startswith("weight_") and not name.startswith("bias_")
        }
        return function(qkv, weights, biases or None, **options)

    return call


def convrel(
    B: int,
    grid: tuple[int, int],
    num_heads: int,
    D: int,
    *groups: tuple[int, int],
    bias: bool = True,
    prefix: int = 1,
    **options: Any,
) -> Case:
    """groups: (window, channels) of the convolutions, in order; none: no relative term."""
    C, N = num_heads * D, prefix + grid[0] * grid[1]
    shapes: dict[str, tuple[int, ...]] = {"qkv": (B, N, 3 * C)}
    for i, (window, channels) in enumerate(groups):
        shapes[f"weight_{i}"] = (channels, 1, window, window)
    if bias:
        shapes |= {f"bias_{i}": (channels,) for i, (_, channels) in enumerate(groups)}
    options |= {"num_heads": num_heads, "grid": grid, "num_prefix_tokens": prefix}
    function, reference = map(by_name, (conv_relative_attention, conv_relative_attention_reference))
    return Case(function, reference, shapes, (B, N, C), options)


def coat(num_heads: int, D: int) -> list[tuple[int, int]]:
    """CoaT's windows 3, 5, 7 for a quarter, three eighths and three eighths of the heads."""
    return [(3, num_heads // 4 * D), (5, num_heads * 3 // 8 * D), (7, num_heads * 3 // 8 * D)]


def convpos(
    B: int,
    grid: tuple[int, int],
    C: int,
    window: int = 3,
    bias: bool = True,
    prefix: int = 1,
) -> Case:
    N = prefix + grid[0] * grid[1]
    shapes: dict[str, tuple[int, ...]] = {"x": (B, N, C), "weight": (C, 1, window, window)}
    if bias:
        shapes["bias"] = (C,)
    return Case(
        conv_position_encoding,
        conv_position_encoding_reference,
        shapes,
        (B, N, C),
        {"grid": grid, "num_prefix_tokens": prefix},
    )


def _case(id: str, *args: Any, **kwargs: Any) -> Any:
    return pytest.param(convrel(*args, **kwargs), id=id)


SMALL = convrel(2, (5, 8), 2, 4, (3, 3), (5, 5))

CASES = [
    _case("coat_lite_stage1", 1, (14, 14), 8, 8, *coat(8, 8)),
    _case("coat_lite_stage2", 2, (14, 14), 8, 16, *coat(8, 16)),
    _case("coat_lite_stage4", 2, (7, 7), 8, 40, *coat(8, 40)),
    _case("coat_lite_medium_stage4", 1, (7, 7), 8, 64, *coat(8, 64)),
    _case("coat_tiny", 1, (14, 14), 8, 19, *coat(8, 19)),
    _case("coat_mini", 1, (14, 14), 8, 27, *coat(8, 27)),
    _case("odd_grid", 2, (11, 5), 2, 8, (3, 6), (5, 10)),
    _case("wide_grid", 1, (3, 37), 2, 8, (5, 16)),
    _case("tall_grid", 1, (37, 3), 2, 8, (5, 16)),
    _case("one_row", 2, (1, 13), 2, 8, (3, 8), (7, 8)),
    _case("one_column", 2, (13, 1), 2, 8, (3, 8), (7, 8)),
    _case("one_pixel", 3, (1, 1), 2, 4, (3, 8)),
    _case("many_tokens", 1, (40, 53), 2, 8, (3, 8), (5, 8)),
    _case("no_prefix", 2, (6, 7), 2, 8, (3, 8), (5, 8), prefix=0),
    _case("prefix_3", 2, (6, 7), 2, 8, (3, 8), (5, 8), prefix=3),
    _case("prefix_alone_matters", 2, (1, 1), 2, 8, (1, 16), prefix=9),
    _case("batch_1", 1, (9, 10), 3, 16, (3, 48)),
    _case("one_head", 2, (6, 5), 1, 24, (3, 24)),
    _case("head_dim_1", 2, (6, 5), 5, 1, (3, 2), (5, 3)),
    _case("head_dim_5", 2, (6, 5), 3, 5, (3, 4), (5, 11)),
    _case("head_dim_27", 1, (8, 7), 2, 27, (7, 27), (5, 27)),
    _case("head_dim_32", 1, (8, 7), 2, 32, (3, 32), (5, 32)),
    _case("head_dim_40", 1, (8, 7), 2, 40, (3, 40), (7, 40)),
    _case("head_dim_70", 1, (8, 7), 2, 70, (3, 70), (5, 70)),
    _case("head_dim_130", 1, (5, 4), 1, 130, (3, 130)),
    _case("window_1", 2, (6, 5), 2, 8, (1, 16)),
    _case("window_9", 2, (12, 11), 2, 8, (9, 16)),
    _case("window_11", 1, (12, 13), 2, 8, (11, 16)),
    _case("window_larger_than_the_grid", 2, (3, 4), 2, 8, (9, 8), (7, 8)),
    _case("windows_1_3_5_7_9", 1, (10, 9), 4, 20, (1, 16), (3, 16), (5, 16), (7, 16), (9, 16)),
    _case("windows_descending", 1, (10, 9), 2, 16, (7, 16), (3, 16)),
    _case("same_window_twice", 1, (10, 9), 2, 16, (5, 16), (5, 16)),
    _case("groups_inside_a_head", 2, (9, 8), 2, 24, (3, 17), (7, 31)),
    _case("groups_inside_a_vector", 2, (9, 8), 2, 16, (3, 3), (5, 2), (7, 1), (3, 26)),
    _case("channel_by_channel", 1, (5, 6), 1, 4, (3, 1), (1, 1), (7, 1), (5, 1)),
    _case("no_relative_term", 2, (9, 8), 2, 16),
    _case("no_relative_term_odd", 2, (5, 7), 3, 19, prefix=0),
    _case("no_bias", 2, (9, 8), 2, 16, (3, 16), (5, 16), bias=False),
    _case("no_bias_odd", 2, (9, 8), 2, 19, (3, 8), (7, 30), bias=False, prefix=0),
    _case("scale_zero", 2, (6, 7), 2, 8, (3, 16), scale=0.0),
    _case("scale_negative", 2, (6, 7), 2, 8, (3, 16), scale=-0.7),
    _case("scale_large", 2, (6, 7), 2, 8, (3, 16), scale=30.0),
    _case("empty_batch", 0, (6, 7), 2, 8, (3, 6), (5, 10)),
    _case("empty_batch_no_relative_term", 0, (6, 7), 2, 8),
]


def _position(id: str, *args: Any, **kwargs: Any) -> Any:
    return pytest.param(convpos(*args, **kwargs), id=id)


SMALL_POSITION = convpos(2, (5, 8), 8)

POSITION_CASES = [
    _position("coat_lite_stage2", 2, (28, 28), 128),
    _position("coat_lite_stage4", 2, (7, 7), 320),
    _position("coat_tiny", 1, (14, 14), 152),
    _position("batch_1", 1, (9, 10), 48),
    _position("odd_grid", 3, (11, 5), 16),
    _position("wide_grid", 1, (3, 37), 32),
    _position("one_row", 2, (1, 13), 8),
    _position("one_column", 2, (13, 1), 8),
    _position("one_pixel", 2, (1, 1), 5),
    _position("many_tokens", 1, (50, 41), 16),
    _position("no_prefix", 2, (6, 7), 24, prefix=0),
    _position("prefix_3", 2, (6, 7), 24, prefix=3),
    _position("channels_1", 2, (6, 7), 1),
    _position("channels_5", 2, (6, 7), 5),
    _position("channels_17", 2, (6, 7), 17),
    _position("channels_70", 1, (6, 7), 70),
    _position("window_1", 2, (6, 7), 16, window=1),
    _position("window_5", 2, (6, 7), 16, window=5),
    _position("window_7", 2, (9, 7), 19, window=7),
    _position("window_9", 1, (12, 11), 16, window=9),
    _position("window_larger_than_the_grid", 2, (2, 3), 16, window=7),
    _position("no_bias", 2, (6, 7), 24, bias=False),
    _position("no_bias_odd", 2, (5, 3), 19, window=5, bias=False, prefix=0),
    _position("empty_batch", 0, (6, 7), 16),
    _position("empty_batch_no_bias", 0, (6, 7), 16, bias=False),
]

# what comes as qkv, x or grad_out, [B, N, channels], in memory
LAYOUTS = [
    pytest.param(lambda t: t.mT.contiguous().mT, id="channels_strided"),
    pytest.param(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), id="tokens_first"),
    pytest.param(lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]], id="wider_rows"),
    pytest.param(lambda t: torch.stack([t, t + 1], -1)[..., 0], id="every_other"),
    pytest.param(lambda t: t[:1].expand_as(t), id="expanded_batch"),
    pytest.param(lambda t: t[:, :1].expand_as(t), id="expanded_tokens"),
    pytest.param(lambda t: t[..., :1].expand_as(t), id="expanded_channels"),
    pytest.param(
        lambda t: torch.cat([t[:1, :1].reshape(-1), t.flatten()])[-t.numel() :].view_as(t),
        id="offset",
    ),
]
