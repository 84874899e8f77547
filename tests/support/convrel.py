"""Cases of conv_relative_attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from support.cases import Case, Tensors
from support.description import Description, param
from support.modules import OnMap
from xattn_ops import ConvRelativeAttention, conv_relative_attention
from xattn_ops.convrel import conv_relative_attention_reference


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

    call.__name__ = function.__name__  # by which `explain` knows it
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
    return Case(function, reference, shapes, {"out": (B, N, C)}, options)


def coat(num_heads: int, D: int) -> list[tuple[int, int]]:
    """CoaT's windows 3, 5, 7 for a quarter, three eighths and three eighths of the heads."""
    return [(3, num_heads // 4 * D), (5, num_heads * 3 // 8 * D), (7, num_heads * 3 // 8 * D)]


_case = param(convrel)

SMALL = convrel(2, (5, 8), 2, 4, (3, 3), (5, 5))

CASES = [
    _case("coat_lite_stage1", 1, (14, 14), 8, 8, *coat(8, 8)),
    _case("coat_lite_stage2", 2, (14, 14), 8, 16, *coat(8, 16)),
    _case("coat_lite_stage4", 2, (7, 7), 8, 40, *coat(8, 40)),
    _case("coat_lite_medium_stage4", 1, (7, 7), 8, 64, *coat(8, 64)),
    _case("coat_tiny", 1, (14, 14), 8, 19, *coat(8, 19)),
    _case("coat_mini", 1, (14, 14), 8, 27, *coat(8, 27)),
    _case("coat_lite_stage2_small", 2, (5, 7), 8, 16, *coat(8, 16)),
    _case("coat_lite_stage4_small", 1, (3, 5), 8, 40, *coat(8, 40)),
    _case("coat_tiny_small", 1, (5, 7), 8, 19, *coat(8, 19)),
    _case("coat_mini_small", 1, (5, 7), 8, 27, *coat(8, 27)),
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


def by_loops(case: Case, tensors: Tensors) -> Tensor:
    """The definition, token by token and channel by channel; shares nothing with the reference."""
    qkv, heads, prefix = (
        tensors["qkv"],
        case.options["num_heads"],
        case.options["num_prefix_tokens"],
    )
    H, W = case.options["grid"]
    B, N, C3 = qkv.shape
    C, D = C3 // 3, C3 // 3 // heads
    weights = [t for name, t in tensors.items() if name.startswith("weight")]
    biases = [t for name, t in tensors.items() if name.startswith("bias")]
    kernels = [kernel for w in weights for kernel in w[:, 0]]  # one for each channel
    bias = torch.cat(biases) if biases else qkv.new_zeros(C)

    out = torch.zeros(B, N, C, dtype=qkv.dtype)
    for b, n, c in ((b, n, c) for b in range(B) for n in range(N) for c in range(C)):
        for d in range(c // D * D, c // D * D + D):
            keys = [math.exp(qkv[b, m, C + d].item()) for m in range(N)]
            mean = sum(k * qkv[b, m, 2 * C + c] for m, k in enumerate(keys)) / sum(keys)
            out[b, n, c] += qkv[b, n, d] * mean / math.sqrt(D)
        if n < prefix or not kernels:
            continue
        (y, x), r = divmod(n - prefix, W), kernels[c].shape[0] // 2
        near = bias[c].clone()
        for dy, dx in ((dy, dx) for dy in range(-r, r + 1) for dx in range(-r, r + 1)):
            if 0 <= y + dy < H and 0 <= x + dx < W:
                value = qkv[b, prefix + (y + dy) * W + x + dx, 2 * C + c]
                near += kernels[c][dy + r, dx + r] * value
        out[b, n, c] += qkv[b, n, c] * near
    return out


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    heads, D = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    cuts = sorted(draw(st.sets(st.integers(1, heads * D), max_size=3)) | {0, heads * D})
    groups = [(draw(st.sampled_from([1, 3, 5, 7, 9])), b - a) for a, b in pairwise(cuts)]
    return convrel(
        draw(st.integers(0, 3)),
        (draw(st.integers(1, 12)), draw(st.integers(1, 12))),
        heads,
        D,
        *(groups if draw(st.integers(0, 4)) else []),
        bias=draw(st.booleans()),
        prefix=draw(st.sampled_from([0, 1, 1, 3])),
        scale=draw(st.sampled_from([None, 0.0, 0.3, -1.0])),
    )


DESCRIPTION = Description(
    name="convrel",
    small=SMALL,
    cases=CASES,
    random=random_cases(),
    isa=[
        "coat_lite_stage1",
        "coat_lite_stage2",
        "coat_tiny",
        "coat_lite_stage2_small",
        "coat_tiny_small",
        "head_dim_5",
        "head_dim_70",
        "prefix_3",
        "window_larger_than_the_grid",
        "windows_1_3_5_7_9",
        "groups_inside_a_vector",
        "no_relative_term_odd",
        "no_bias_odd",
    ],
    definition=by_loops,
    defined=[
        _case("groups", 2, (3, 4), 2, 2, (3, 3), (5, 1)),
        _case("no_prefix", 1, (2, 3), 1, 3, (7, 3), prefix=0),
        _case("no_bias", 1, (4, 2), 1, 2, (3, 2), prefix=2, bias=False),
        _case("no_relative_term", 1, (2, 3), 2, 2),
    ],
    half=convrel(1, (3, 5), 3, 4, (3, 12)),
    gradcheck=[
        _case("groups", 2, (2, 3), 2, 2, (3, 1), (5, 3)),
        _case("no_prefix", 1, (3, 2), 1, 3, (3, 3), prefix=0, bias=False),
        _case("prefix_3", 1, (1, 4), 1, 2, (3, 2), prefix=3),
        _case("no_relative_term", 2, (2, 3), 2, 2),
        _case("scale_zero", 1, (2, 3), 1, 2, (3, 2), scale=0.0),
    ],
    twice=convrel(1, (2, 3), 2, 2, (3, 1), (1, 3)),
    strided=[
        _case("groups", 2, (5, 8), 2, 16, (3, 10), (5, 22)),
        _case("windows_3_7", 2, (9, 8), 2, 16, (3, 10), (7, 22)),
        _case("no_relative_term", 2, (5, 8), 2, 4),
        _case("odd_heads", 1, (3, 5), 8, 19, *coat(8, 19)),
        _case("window_9", 1, (4, 3), 2, 16, (9, 32)),
    ],
    steady=[
        _case("odd_grid", 3, (13, 11), 8, 8, *coat(8, 8)),
        _case("batch_1", 1, (14, 14), 8, 8, *coat(8, 8)),
        _case("batch_3", 3, (7, 9), 8, 19, *coat(8, 19)),
        _case("many_tokens", 1, (56, 56), 2, 16, (3, 32)),
    ],
    large=convrel(1, (128, 128), 8, 8, *coat(8, 8)),  # a copy of q is 4 MB, N x N 1 GB a head
    scratch=4 << 20,
    module=lambda **options: OnMap(ConvRelativeAttention(8, 2, windows={3: 1, 5: 1}, **options)),
    drops=("proj_drop",),
    of_size=lambda B, H, W: convrel(B, (H, W), 2, 4, (3, 3), (5, 5)),
)
